import math

import pytest
import torch

from fxgraft.errors import InputError
from fxgraft.kernels.gated_activation.op import SPEC
