"""Every exception that zerofit raises on purpose, in one tree.

::

    ZerofitError                 exit 1   something failed while it ran
    ├── RequestError             exit 2   the request is wrong; nothing was started
    │   ├── ConfigError                   a key, a type, a value, batch arithmetic, an illegal combination
    │   ├── DataError                     data missing, empty, too short, or not what the model expects
    │   ├── CheckpointError               a checkpoint is missing, torn, or of another model
    │   └── MissingDependency             an optional package or a tool is not installed
    ├── DoesNotFit               exit 3   no candidate fits the hardware
    ├── Interrupted              exit 4   asked to stop, saved, resumable
    └── TrainingFailed           exit 1   the loss is not finite, a rank died, a collective hung

A message is one paragraph: what was asked, what was found, the rule, the remedy. The command line prints it
without a traceback unless ``--debug`` is given.
"""

from __future__ import annotations


class ZerofitError(Exception):
    """Base of all errors that zerofit raises on purpose. Carries the process's exit code."""

    exit_code = 1


class RequestError(ZerofitError):
    """What was asked cannot be done as asked; nothing was started."""

    exit_code = 2


class ConfigError(RequestError):
    """The configuration is wrong."""


class DataError(RequestError):
    """The data is missing, empty, too short, or does not match the model."""


class CheckpointError(RequestError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class MissingDependency(RequestError):
    """An optional package or a tool is missing; the message names the install command."""


class DoesNotFit(ZerofitError):
    """Nothing that was allowed fits the hardware."""

    exit_code = 3


class Interrupted(ZerofitError):
    """Stopped on request after saving; the run can be resumed."""

    exit_code = 4


class TrainingFailed(ZerofitError):
    """Training started and could not go on."""
