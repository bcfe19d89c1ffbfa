"""What draws the sequences of training: the ``Sampler`` protocol, and transformers; the engine is in ``vllm``."""

from vllm_twist.training.samplers.base import LAWS as LAWS
from vllm_twist.training.samplers.base import DrawRequest as DrawRequest
from vllm_twist.training.samplers.base import Draws as Draws
from vllm_twist.training.samplers.base import Sampler as Sampler
from vllm_twist.training.samplers.base import end_token_ids as end_token_ids
from vllm_twist.training.samplers.transformers import TransformersSampler as TransformersSampler
