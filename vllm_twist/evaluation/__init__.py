"""Evaluate twist heads: ``Evaluator`` measures, ``table`` and ``plot`` show what it found."""

from vllm_twist.evaluation.evaluator import Evaluation as Evaluation
from vllm_twist.evaluation.evaluator import EvaluationConfig as EvaluationConfig
from vllm_twist.evaluation.evaluator import Evaluator as Evaluator
from vllm_twist.evaluation.evaluator import PromptEvaluation as PromptEvaluation
from vllm_twist.evaluation.evaluator import Row as Row
from vllm_twist.evaluation.report import plot as plot
from vllm_twist.evaluation.report import table as table
