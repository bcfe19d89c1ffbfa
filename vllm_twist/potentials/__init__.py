"""Potentials: log phi of finished outputs, what makes a target of a language model."""

from vllm_twist.potentials.base import Constant as Constant
from vllm_twist.potentials.base import Function as Function
from vllm_twist.potentials.base import Intermediate as Intermediate
from vllm_twist.potentials.base import LogPhi as LogPhi
from vllm_twist.potentials.base import Potential as Potential
from vllm_twist.potentials.base import Scaled as Scaled
from vllm_twist.potentials.base import Sum as Sum
from vllm_twist.potentials.base import TokenLogistic as TokenLogistic
from vllm_twist.potentials.loading import KINDS as KINDS
from vllm_twist.potentials.loading import POTENTIAL_NAME as POTENTIAL_NAME
from vllm_twist.potentials.loading import load_potential as load_potential
from vllm_twist.potentials.loading import reads_model as reads_model
from vllm_twist.potentials.models import SCORES as SCORES
from vllm_twist.potentials.models import Classifier as Classifier
from vllm_twist.potentials.models import Continuation as Continuation
