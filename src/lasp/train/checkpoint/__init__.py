"""Checkpoints and exports: folders that are whole or absent, and tensors between them and the processes."""

from lasp.train.checkpoint.sealed import (
    FORMAT,
    MANIFEST,
    STATE,
    Checkpoint,
    FileSeal,
    abandon,
    begin,
    candidates,
    commit,
    exists,
    find,
    is_checkpoint,
    restore,
    run_folder,
    seal_file,
    verify,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "STATE",
    "Checkpoint",
    "FileSeal",
    "abandon",
    "begin",
    "candidates",
    "commit",
    "exists",
    "find",
    "is_checkpoint",
    "restore",
    "run_folder",
    "seal_file",
    "verify",
]
