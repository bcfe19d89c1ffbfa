"""Potentials: log phi of finished outputs, what makes a target of a language model."""

from vllm_twist.potentials.base import KINDS as KINDS
from vllm_twist.potentials.base import POTENTIAL_NAME as POTENTIAL_NAME
from vllm_twist.potentials.base import SCORES as SCORES
from vllm_twist.potentials.base import Classifier as Classifier
from vllm_twist.potentials.base import Constant as Constant
from vllm_twist.potentials.base import Continuation as Continuation
from vllm_twist.potentials.base import Function as Function
from vllm_twist.potentials.base import Intermediate as Intermediate
from vllm_twist.potentials.base import LogPhi as LogPhi
from vllm_twist.potentials.base import Potential as Potential
from vllm_twist.potentials.base import Scaled as Scaled
from vllm_twist.potentials.base import Sum as Sum
from vllm_twist.potentials.base import TokenLogistic as TokenLogistic
from vllm_twist.potentials.base import load_potential as load_potential
from vllm_twist.potentials.base import reads_model as reads_model
