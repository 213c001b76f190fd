"""A package for ROS 2 (ament_python) with a node that publishes a bundle's answers, mostly as ``vision_msgs``."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.sax.saxutils import escape

from resvit_engines.errors import ExitCode, ResvitError
from resvit_export.serve.subject import FILES, Subject

TASKS = {
    "classification": "vision_msgs/Classification",
    "detection": "vision_msgs/Detection2DArray",
    "segmentation": "sensor_msgs/Image (16SC1) and vision_msgs/LabelInfo",
    "depth": "sensor_msgs/Image (32FC1)",
    "text": "std_msgs/String",
    "embedding": "std_msgs/Float32MultiArray",
}
"""What the node publishes on ``answers``, by task."""


def write_package(subject: Subject, folder: Path) -> list[str]:
    """Write the package into the empty ``folder``; returns what there is to know.

    Raises:
        ResvitError: IMPOSSIBLE for a task that has no messages.
    """
    task, package = subject.reading.task, subject.identifier
    if task not in TASKS:
        raise ResvitError(
            f"The task is {task}, whose answers no message holds.",
            "Call it from a node of your own: resvit_engines.load, docs/program.md.",
            ExitCode.IMPOSSIBLE,
        )
    _ = subject.image  # refuses what reads more than images
    said = {
        "PACKAGE": package,
        "BUNDLE": subject.name,
        "TASK": task,
        "MESSAGES": TASKS[task],
        "VERSION": f"{subject.manifest.release}.0.0",
    }
    places = {
        "package.xml": "ros2_package.xml.in",
        "setup.py": "ros2_setup.py.in",
        "setup.cfg": "ros2_setup.cfg.in",
        f"launch/{package}.launch.py": "ros2_launch.py.in",
    }
    for name, source in places.items():
        text = (FILES / source).read_text()
        for key, value in said.items():
            text = text.replace(f"@{key}@", escape(value) if name.endswith(".xml") else value)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "resource").mkdir()
    (folder / "resource" / package).touch()
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(f'"""What {subject.name} answers, as messages of ROS 2."""\n')
    for name in ("node", "messages"):
        shutil.copyfile(FILES / f"ros2_{name}.py.in", folder / package / f"{name}.py")
    return [
        f"The node reads `image` and publishes {TASKS[task]} on `answers`.",
        "Its Python needs resvit_engines: pip install resvit-export.",
        f"ros2 launch {package} {package}.launch.py bundle:={subject.name} image:=/camera/image_raw",
    ]
