"""Builds the native kernels into the wheel, or in place for an editable install.

Without a compiler the package is still whole: the engine then computes with torch, and says so. Set
DEEPFLOW_REQUIRE_KERNELS=1 to have such a build fail instead, DEEPFLOW_SKIP_KERNELS=1 for services that need none.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("services/worker/flowserve/native")


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc]
    """Found by hatchling under this name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one of this platform; the kernels need no particular Python."""
        if os.environ.get("DEEPFLOW_SKIP_KERNELS") == "1":
            return
        spec = importlib.util.spec_from_file_location("build", Path(self.root, NATIVE, "build.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            library = module.build()
        except module.BuildError as error:
            if os.environ.get("DEEPFLOW_REQUIRE_KERNELS") == "1":
                raise
            self.app.display_warning(f"no native kernels, the engine will use torch: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = str(NATIVE / library.name)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{os.uname().machine}"
