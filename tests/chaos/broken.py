"""Switches the commit protocol off in this process, as a control: what the chaos run is for must then be found.

Files are written straight into the checkpoint's folder, which counts from its first moment, and the newest number is taken
for whole. They are still flushed: a process that is killed cannot tell, and the kills fall into the same places.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any


def switch_off_the_protocol() -> None:
    save: Any = import_module("qlora.checkpoint.save")
    resume: Any = import_module("qlora.checkpoint.resume")
    state: Any = import_module("qlora.checkpoint.state")

    def commit(folder: Path, contents: Any, identity: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / state.COMMITTED).write_bytes(b"")
        for name, content in contents.items():
            save._write(folder / name, content)
        manifest = state.Manifest({name: {"size": 0, "sha256": ""} for name in contents}, identity)
        save._write(folder / state.MANIFEST_NAME, manifest.to_json())

    def find(run_dir: Path, wanted: str) -> Any:
        folders = state.committed(run_dir)
        if not folders:
            return None
        fields = json.loads((folders[-1] / state.STATE_NAME).read_text())
        manifest = json.loads((folders[-1] / state.MANIFEST_NAME).read_text())
        return resume.Found(folders[-1], state.TrainerState(**fields), state.Identity(**manifest["identity"]))

    save._commit, resume.find_checkpoint = commit, find
