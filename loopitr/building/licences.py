"""The licence in a card's metadata: the hub refuses a card whose licence is not in its list."""

from __future__ import annotations

import re
from typing import Any

KNOWN = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "lppl-1.3c",
        "ms-pl",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "apple-ascl",
        "apple-amlr",
        "unknown",
        "other",
    ]
)


def licence_fields(name: str) -> dict[str, Any]:
    """The fields `license` and, if the hub does not know the name, `license_name` of a card's metadata.

    Example:
        >>> from loopitr.building.licences import licence_fields
        >>> licence_fields("MIT"), licence_fields("Our licence, v2")
        ({'license': 'mit'}, {'license': 'other', 'license_name': 'our-licence-v2'})
    """
    own = name.strip().lower()
    if own in KNOWN:
        return {"license": own}
    slug = re.sub(r"[^a-z0-9.+]+", "-", own).strip("-.")[:100]
    return {"license": "other", "license_name": slug} if slug else {"license": "unknown"}
