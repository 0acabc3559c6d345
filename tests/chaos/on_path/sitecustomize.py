"""Changes the engine and the store, in every process that has this folder on its PYTHONPATH.

Only tests put it there. The environment says what is to be changed:

JOURNEYMAN_TEST_ENGINE=stand_in       that module's engine in place of ours
JOURNEYMAN_TEST_DEADLY=TEXT           a row with this text kills the engine core, each time
JOURNEYMAN_TEST_FATAL=TEXT            a row with this text kills its replica, each time
JOURNEYMAN_TEST_COMMIT_S=SECONDS      between a shard's files and its commit
JOURNEYMAN_TEST_STEP_S=SECONDS        before each optimizer step of a training
JOURNEYMAN_TEST_RESIZE_S=SECONDS      between two looks for room for more training workers
JOURNEYMAN_TEST_GPUS=1                a worker of vLLM's CPU build counts as what Ray calls a GPU
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
import time


def _change_engine(module):
    if chosen := os.environ.get("JOURNEYMAN_TEST_ENGINE"):
        module.Engine = importlib.import_module(chosen).engine(module)
    module.Engine = importlib.import_module("deadly").engine(module.Engine)


def _change_commits(module):
    seconds = float(os.environ.get("JOURNEYMAN_TEST_COMMIT_S", "0"))
    create = module.CommitFiles.create

    def create_later(self, commit):
        time.sleep(seconds)
        return create(self, commit)

    module.CommitFiles.create = create_later


def _change_steps(module):
    seconds = float(os.environ.get("JOURNEYMAN_TEST_STEP_S", "0"))
    take = module.Steps.take

    def take_later(*arguments):
        time.sleep(seconds)
        return take(*arguments)

    module.Steps.take = take_later


def _change_resizing(module):
    if seconds := os.environ.get("JOURNEYMAN_TEST_RESIZE_S"):
        module.RESIZE_INTERVAL_S = float(seconds)


def _change_platform(module):
    """Ray's executor then takes it: vLLM names no resource of Ray's for a CPU."""
    if os.environ.get("JOURNEYMAN_TEST_GPUS"):
        module.CpuPlatform.ray_device_key = "GPU"


def _change_runner(module):
    """On a GPU the dummy run makes what a pipeline's later workers receive into; a CPU has none."""
    load = module.CPUModelRunner.load_model

    def load_and_make(self, *arguments, **named):
        load(self, *arguments, **named)
        from vllm.distributed.parallel_state import get_pp_group

        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    if os.environ.get("JOURNEYMAN_TEST_GPUS"):
        module.CPUModelRunner.load_model = load_and_make


class _Finder(importlib.abc.MetaPathFinder):
    """Lets a module load as it is, then changes it."""

    def __init__(self):
        self._changes = {
            "journeyman.teacher.engine": _change_engine,
            "journeyman.labels.commits": _change_commits,
            "journeyman.student.worker": _change_steps,
            "journeyman.student.loop": _change_resizing,
            "vllm.platforms.cpu": _change_platform,
            "vllm.v1.worker.cpu_model_runner": _change_runner,
        }

    def find_spec(self, fullname, path, target=None):
        change = self._changes.pop(fullname, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, _Finder())
