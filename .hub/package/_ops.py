"""torch.ops of this build. Its namespace is the name that the build is loaded under, which no other build has."""

import torch

from tkernels.core.library import NAMESPACE

ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    return f"{NAMESPACE}::{name}"
