"""Learn twist heads: ``TwistTrainer`` and its ``TrainingConfig``.

One concern a file: ``trainer`` is the loop, ``samplers`` draw, ``teacher_forcing`` scores what was drawn.
"""

from vllm_twist.training.checkpoint import STATE_NAME as STATE_NAME
from vllm_twist.training.config import POSITIVES as POSITIVES
from vllm_twist.training.config import SAMPLERS as SAMPLERS
from vllm_twist.training.config import TrainingConfig as TrainingConfig
from vllm_twist.training.trainer import TwistTrainer as TwistTrainer
