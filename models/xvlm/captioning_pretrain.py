"""XVLM trained further to write about images before it is fine-tuned for captioning: the same model without a prompt.

Its checkpoints are those of models/xvlm/captioning.py.
"""

from models.xvlm.captioning import NEW, TEXT, build, prunable_view, task_names

__all__ = ["NEW", "TEXT", "build", "prunable_view", "task_names"]  # the template is [CLS] x [SEP]
