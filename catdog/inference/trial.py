"""A trial: images are read and decoded in a child process, to find those that kill the process which decodes them.

A decoder is native code. An image can make it crash, or take all the memory there is, and nothing that Python does can
catch that. Where a worker has died, the images that it had under way are therefore tried here first. The child says
which image it comes to, one line each, so that whoever watches it knows at which one it died.

Run as a program (`python -m catdog.inference.trial`), this module is the child: it takes a JSON object on stdin.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from catdog import storage
from catdog.errors import CatdogError, ImageError
from catdog.images import decode
from catdog.provenance import redact
from catdog.storage import SourceFile

logger = logging.getLogger(__name__)


def deadly(files: Sequence[SourceFile], image_size: int, own: Sequence[str]) -> dict[SourceFile, ImageError]:
    """Those of the images that kill a process which decodes them, each with the error for its row.

    Args:
        files: the images.
        image_size: side of the decoded image, in pixels.
        own: the job's own storages, as for `storage.read_sources`.
    """
    found: dict[SourceFile, ImageError] = {}
    start = 0
    while start < len(files):
        returncode, num_begun = _try(files[start:], image_size, own)
        if returncode >= 0 or num_begun == 0:
            break  # it came to the end; or it failed in another way, which labelling will meet, too
        file = files[start + num_begun - 1]
        name = signal.Signals(-returncode).name
        logger.warning("%s killed the process that decoded it, with %s", redact(file.uri), name)
        found[file] = ImageError("decoder_died", f"the process that decoded the image died of {name}")
        start += num_begun
    return found


def _try(files: Sequence[SourceFile], image_size: int, own: Sequence[str]) -> tuple[int, int]:
    """(exit code of the child, number of images that it has begun)."""
    images = [(file.uri, file.num_bytes, file.version) for file in files]
    child = subprocess.run(
        [sys.executable, "-m", "catdog.inference.trial"],
        input=json.dumps({"images": images, "image_size": image_size, "own": list(own)}).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # of a worker's working directory
        check=False,
    )
    return child.returncode, child.stdout.count(b"\n")


def main() -> None:
    """Decode the images that stdin names, and say before each that it begins."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, the kernel is to kill this process and no other
    task = json.load(sys.stdin)
    uris, sizes, versions = zip(*task["images"], strict=True)
    contents = storage.read_sources(uris, sizes, versions, own=task["own"])
    for _ in uris:
        os.write(sys.stdout.fileno(), b"\n")
        with contextlib.suppress(ImageError):
            content = next(contents)
            if isinstance(content, bytes):
                decode(content, task["image_size"])


if __name__ == "__main__":
    try:
        main()
    except CatdogError:
        sys.exit(1)
