"""The settings and the manifest of a set of shards. FORMAT.md lists the manifest's fields.

The manifest is written last, atomically: a set that has one is complete. It has a checksum of its
own, and is read only if that holds.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import MANIFEST, write_atomically
from shards.holding import holds_its_types

FORMAT_VERSION = 3
INDEX = "index.npy"
REJECTED = "rejected.jsonl"
CARD = "README.md"  # what the set is, for people and for the Hugging Face Hub
# What else a finished set's folder may hold: pages and pictures that commands write there.
EXTRAS = frozenset({"inspect.html", "fidelity.png", CARD})
FREQUENCY = "frequency"  # the one map that is not of keypoints
AREA = (0.67, 1.0)  # of a crop: least and most share of the source, as published
BANK_CELL = 8  # px of a crop's side that one count of a bank covers; counts are 0 to 64
MARKS = ("ring", "disc", "point")
DETECT_ON = ("source", "frame")
LARGEST = 8192  # px of a frame's side; a record that says more asks for gigabytes
DENSITY_LEVELS = (256, 16)  # densities that a map tells apart; 16 where it comes from version 2
FIXED_POINT = 256  # a stored weight is value / 256
NAME = re.compile(r"[a-z0-9_-]{1,40}")  # of a detector: part of the names of files
# Settings that are numbers, with the least and the most they may be.
RANGES = (
    ("frame", 16, LARGEST),
    ("quality", 0, 100),
    ("crop", 32, 1024),
    ("map_crops", 0, 64),
    ("bank", 0, 255),
    ("grid", 2, 254),
    ("shard_size", 0, 1 << 40),
)


@dataclass(frozen=True, slots=True)
class File:
    """A file of the set: its name (no folder), records it holds, bytes and sha256 (hex)."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where every input went: inputs = written + sum of rejected, by reason."""

    inputs: int
    written: int
    rejected: dict[str, int]

    @property
    def balanced(self) -> bool:
        """Whether the totals add up."""
        return self.inputs == self.written + sum(self.rejected.values())

    @property
    def rejected_share(self) -> float:
        """The share of inputs that was rejected, 0 to 1."""
        return sum(self.rejected.values()) / max(1, self.inputs)


@dataclass(frozen=True, slots=True)
class Plugin:
    """A person's own detector: `module:function`, its version ("" if it has none), and the sha256
    (hex) of the file that it stands in.
    """

    function: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Edge:
    """A measured edge rule: the `share` of its density that a detector finds `at` each distance
    from the edge, px, linear in between; for one kind of mark, over so many photos.
    """

    at: list[float]
    share: list[float]
    mark: str
    photos: int


@dataclass(frozen=True, slots=True)
class Detector:
    """The detector of a map, with every option, by the names that OpenCV gives them.

    plugin: a detector of the user's own; edge: its measured edge rule. `frequency` is a map without
    keypoints: no marks, no edge rule, no bank.
    """

    name: str
    options: dict[str, int | float | bool]
    plugin: Plugin | None = None
    edge: Edge | None = None

    @property
    def has_keypoints(self) -> bool:
        """Whether it is run on each view and crop: a keypoint detector or a plug-in."""
        return self.name != FREQUENCY

    @property
    def call(self) -> str:
        """How `--detector` names it."""
        return f"{self.name}={self.plugin.function}" if self.plugin else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the bytes of a record, together with the input and the versions of libraries.

    frame: side of the stored square, px, or 0: densities without frames. quality: JPEG 1 to 100, or
    0 for raw pixels. crop: side of the training crops that densities are for, px; area: least and
    most share of the source that such a crop shows. map_crops: random crops that a map averages
    over, beside the whole. bank: crops stored per image, with their exact counts. grid: cells per
    side of a map. mark: what a keypoint covers. detect_on: source or frame. detectors: in the order
    of the maps. shard_size: inputs per shard. weights: (T, w_ps) of the loss weights stored beside
    the densities, None for none. levels: densities that a map tells apart. Raises UserError if a
    value is out of its range. docs/decisions.md has the measurements behind the defaults.
    """

    frame: int = 256
    quality: int = 90
    crop: int = 192
    area: tuple[float, float] = AREA
    map_crops: int = 3
    bank: int = 0
    grid: int = 54
    mark: str = "ring"
    detect_on: str = "source"
    detectors: tuple[Detector, ...] = ()
    shard_size: int = 0
    weights: tuple[float, int] | None = None
    levels: int = DENSITY_LEVELS[0]

    def __post_init__(self) -> None:
        for each in fields(self):  # 90.0 would be written, and be damage when it is read
            value = getattr(self, each.name)
            if each.type is int and type(value) is not int:
                raise UserError(f"{each.name} is {value!r}; give a whole number")
        for name, least, most in RANGES:
            value = getattr(self, name)
            if not least <= value <= most and not (name == "frame" and value == 0):
                raise UserError(f"{name} {value} is out of range; give {least} to {most}")
        if not 0.01 <= self.area[0] <= self.area[1] <= 1:
            area = self.area[0] if self.area[1] == 1 else self.area
            raise UserError(f"area {area} is out of range; give 0.01 to 1")
        self._check_bare()
        if self.crop % BANK_CELL:
            nearest = round(self.crop / BANK_CELL) * BANK_CELL
            raise UserError(f"crop {self.crop} is no multiple of {BANK_CELL}; give {nearest}")
        if self.levels not in DENSITY_LEVELS:
            raise UserError(f"levels {self.levels} is unknown; there are 256, and 16 of version 2")
        names = [detector.name for detector in self.detectors]
        if len(set(names)) < len(names):
            raise UserError(f"detectors {', '.join(names)}: name each once")
        for detector in self.detectors:
            if not NAME.fullmatch(detector.name):
                raise UserError(f"a detector's name has a-z, 0-9, _ and -, not {detector.name!r}")
            if detector.edge and detector.edge.mark != self.mark:
                raise UserError(
                    f"mark is {self.mark!r}, and the edge rule of {detector.name} was measured for "
                    f"{detector.edge.mark!r}: measure it again with --mark {self.mark}"
                )
        if self.weights is not None:
            temperature, w_ps = self.weights
            object.__setattr__(self, "weights", (float(temperature), w_ps))
            self._check_weights(*self.weights)
        for name, words in (("mark", MARKS), ("detect_on", DETECT_ON)):
            if getattr(self, name) not in words:
                raise UserError(f"{name} is {getattr(self, name)!r}; there are {', '.join(words)}")
        bare = [detector.name for detector in self.detectors if not detector.has_keypoints]
        if self.bank and bare:
            raise UserError(
                f"a bank holds counts of keypoint marks, and {bare[0]} has none: build it without "
                f"a bank, or leave {bare[0]} out"
            )

    @property
    def cells(self) -> int:
        """Cells per side of a stored crop's counts."""
        return self.crop // BANK_CELL

    def _check_bare(self) -> None:
        """UserError if there are no frames, and a setting needs them."""
        kept = ("quality", "bank", "weights")
        odd = [name for name in kept if self.frame == 0 and getattr(self, name)]
        odd += ["detect_on"] if self.frame == 0 and self.detect_on != "source" else []
        if odd:
            raise UserError(
                f"frame 0 stores densities alone, and {odd[0]} is {getattr(self, odd[0])!r}: build "
                f"them by `kamim maps build`, or give a frame of 16 to {LARGEST} px"
            )

    def _check_weights(self, temperature: float, w_ps: int) -> None:
        """UserError unless the weights can be computed from what is stored, and fit 16 bits."""
        least = 1 / math.log((1 << 16) / FIXED_POINT - 1)
        if not least <= temperature < math.inf:
            raise UserError(
                f"weights of temperature {temperature:g} reach beyond 255, the most that is "
                f"stored; give {math.ceil(1000 * least) / 1000} or more"
            )
        step = BANK_CELL if self.bank else 1
        if type(w_ps) is not int or w_ps < 1 or self.crop % w_ps or w_ps % step:
            rule = f"a multiple of {BANK_CELL} that divides" if self.bank else "a divisor of"
            raise UserError(f"w_ps {w_ps} of the weights: give {rule} the crop of {self.crop} px")


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json as an object; see FORMAT.md for each field."""

    format_version: int
    container: str  # webdataset, ffcv, or maps: densities without frames
    settings: Settings
    source: dict[str, Any]  # kind, inputs, ignored, sha256 of the listing
    classes: list[str]
    versions: dict[str, str]
    fingerprint: str
    ledger: Ledger
    shards: list[File]
    index: File
    rejected: File
    fidelity: dict[str, Any]  # what `kamim shards fidelity` last measured; empty until then
    names: list[File] = field(default_factory=list)  # of a set that is read by name

    @property
    def count(self) -> int:
        """Records in all shards."""
        return self.ledger.written

    @property
    def files(self) -> list[File]:
        """All files of the set, its shards first."""
        return [*self.shards, self.index, self.rejected, *self.names]

    @property
    def detectors(self) -> list[str]:
        """Detector names in the order of the maps."""
        return [detector.name for detector in self.settings.detectors]


def fingerprint(facts: Mapping[str, Any]) -> str:
    """sha256 (hex) of `facts` as canonical JSON: equal facts, equal fingerprint."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def write_file(path: Path, data: bytes, count: int) -> File:
    """Write `data` to `path` atomically; returns its row: `count` records, size and sha256."""
    write_atomically(path, data)
    return file_of(path.name, data, count)


def file_of(name: str, data: bytes, count: int) -> File:
    """The row of a file that holds `data`, `count` records."""
    return File(name, count, len(data), sha256_of_bytes(data))


def sha256_of_bytes(data: bytes) -> str:
    """sha256 (hex) of `data`."""
    return hashlib.sha256(data).hexdigest()


def plain(part: Manifest | Settings | Detector) -> dict[str, Any]:
    """`part` as it stands in JSON: a detector without plug-in or edge rule does not name them."""
    absent = {"plugin": None, "edge": None}.items()
    return asdict(part, dict_factory=lambda pairs: dict(p for p in pairs if p not in absent))


def to_json(manifest: Manifest) -> bytes:
    """The exact bytes of manifest.json: sorted keys, two-space indent, a checksum of the rest."""
    content = plain(manifest)
    if not manifest.names:
        del content["names"]
    content["checksum"] = fingerprint(content)
    return as_json(content)


def as_json(content: Mapping[str, Any]) -> bytes:
    """`content` as the bytes of a manifest."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")


def write(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, or put it in place of the one there."""
    write_atomically(folder / MANIFEST, to_json(manifest))


def load(folder: Path | str) -> Manifest:
    """Read and check the manifest of the set in `folder`. Raises UserError if it is missing,
    damaged, of another format, or does not add up.
    """
    path = (folder := Path(folder)) / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        scheme, slashes, rest = str(folder).partition(":/")
        if slashes and scheme.isalnum():  # a URL that became a path
            raise UserError(
                f"{scheme}://{rest} is not on this machine; copy it, and each file of it is "
                f"checked: kamim shards copy {scheme}://{rest} FOLDER"
            ) from None
        names = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
        if sets := sorted(name for name in names if (folder / name / MANIFEST).is_file()):
            raise UserError(f"{folder} holds the sets {', '.join(sets)}; name one") from None
        words = f"{folder} OUT" if names and INDEX not in names else f"SOURCE {folder}"
        build = f"build one with `kamim shards build {words}`"
        build = "the command that began it goes on" if ".build" in names else build
        said = f"{folder} has no {MANIFEST}: it is not a finished set of shards"
        raise UserError(f"{said}; {build}") from None
    return parse(path, data)


def parse(path: Path | str, data: bytes) -> Manifest:
    """The manifest that `data`, the content of `path`, says. Raises UserError as load does."""
    try:
        content = json.loads(data)
        version = content["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: it is not the JSON that a build writes") from None
    if version == 2:
        folder = str(path).rpartition("/")[0] or "."
        raise UserError(
            f"{path} has format version 2, this kamim reads version {FORMAT_VERSION}; convert the "
            f"set, which needs no source: kamim shards upgrade {folder} NEW"
        )
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version!r}, this kamim reads version {FORMAT_VERSION}; "
            f"install the kamim that wrote it (versions: {content.get('versions')})"
        )
    return _parse(path, data, content)


def detector_of(row: dict[str, Any]) -> Detector:
    """The detector that plain() gave. Raises TypeError or KeyError if it is none."""
    plugin = {"plugin": Plugin(**row["plugin"])} if "plugin" in row else {}
    edge = {"edge": Edge(**row["edge"])} if "edge" in row else {}
    return Detector(**{**row, **plugin, **edge})


def settings_of(plain: dict[str, Any]) -> Settings:
    """The settings that plain() gave. Raises TypeError, KeyError or UserError if it is none."""
    return Settings(
        **{
            **plain,
            "area": tuple(plain["area"]),
            "weights": plain["weights"] and tuple(plain["weights"]),
            "detectors": tuple(map(detector_of, plain["detectors"])),
        }
    )


def _parse(path: Path | str, data: bytes, content: dict[str, Any]) -> Manifest:
    rule = "its content does not match its checksum; restore it, or build anew in another folder"
    damaged = UserError(f"{path} is damaged: {rule}")
    content.pop("checksum", None)
    content.setdefault("names", [])
    if set(content) != {each.name for each in fields(Manifest)}:
        raise damaged
    try:
        manifest = Manifest(
            **{
                **content,
                "settings": settings_of(content["settings"]),
                "ledger": Ledger(**content["ledger"]),
                "shards": [File(**row) for row in content["shards"]],
                "index": File(**content["index"]),
                "rejected": File(**content["rejected"]),
                "names": [File(**row) for row in content["names"]],
            }
        )
        whole = to_json(manifest) == data and holds_its_types(manifest)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        raise damaged from None
    if not whole or (manifest.container == "maps") != (manifest.settings.frame == 0):
        raise damaged
    for file in manifest.files:
        if Path(file.name).name != file.name or file.name in {"", ".", ".."}:
            raise UserError(f"{path} names the file {file.name!r}; names may hold no folder")
    if not manifest.ledger.balanced or manifest.count != sum(s.count for s in manifest.shards):
        raise UserError(f"{path}: the ledger does not balance: {manifest.ledger}; rebuild the set")
    return manifest
