"""The SBOM of a wheel (PEP 770, CycloneDX), from what the build knows of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CUDA_LICENSE = {
    "name": "NVIDIA CUDA Toolkit End User License Agreement",
    "url": "https://docs.nvidia.com/cuda/eula/",
}


def document(version: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What the library holds beside its own sources: NVIDIA's CUDA runtime where it has CUDA
    kernels, nothing else."""
    wheel = {
        "type": "library",
        "name": "nitp_ops",
        "version": version,
        "purl": f"pkg:pypi/nitp-ops@{version}",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "properties": [
            {"name": key, "value": facts[key]} for key in ("commit", "compiler", "flags")
        ],
    }
    runtime = {
        "type": "library",
        "name": "cudart_static",
        "version": facts["cuda"],
        "supplier": {"name": "NVIDIA Corporation"},
        "licenses": [{"license": CUDA_LICENSE}],
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": wheel},
        "components": [runtime] if facts["cuda"] else [],
    }


def write(dist_info: Path, version: str, facts: dict[str, Any]) -> None:
    file = dist_info / "sboms/nitp_ops.cdx.json"
    file.parent.mkdir()
    file.write_text(json.dumps(document(version, facts), indent=1) + "\n")
