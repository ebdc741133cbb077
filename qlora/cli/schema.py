"""`qlora schema`: the job file's schema for editors."""

from __future__ import annotations

from qlora.cli.failures import DebugOption
from qlora.cli.rows import print_json


def schema(debug: DebugOption = False) -> None:
    """Print the JSON Schema of the job file.

    Editors that know it complete keys and show mistakes while typing: `# yaml-language-server: $schema=FILE` on the
    first line of a job file.
    """
    from qlora.config.schema import JobConfig

    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **JobConfig.model_json_schema()})
