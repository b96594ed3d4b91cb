"""What newcomers type, and what each mistake must be answered with; no test by itself.

PREPARE are the commands that make what the MISTAKES are made with.
"""

from dataclasses import dataclass

SMALL = "--frame 128 --crop 96 --map-crops 1 --shard-size 6"
RUN = "--recipe small --batch 12 --epochs 1 --device cpu"

# photos/cats and photos/dogs hold 12 photographs each, spoilt one that is none besides.
PREPARE = (
    f"kamim shards build photos sets/good {SMALL}",
    "cp -r sets/good sets/lost && rm sets/lost/shard-000001.tar",
    "cp -r sets/good sets/short && truncate -s -512 sets/short/shard-000001.tar",
    "cp -r sets/good sets/flipped && printf '\\125' | "
    "dd of=sets/flipped/shard-000001.tar bs=1 seek=2000 conv=notrunc status=none",
    "kamim shards convert sets/good",
    f"kamim pretrain sets/good {RUN} --out runs/done",
    "kamim export runs/done mine.safetensors",
    "mkdir -p empty foreign && echo mine > foreign/notes.txt && echo no photograph > a-file",
)


@dataclass(frozen=True, slots=True)
class Mistake:
    """A command, the exit status it must have, and a pattern for the step its line must name."""

    command: str
    says: str
    status: int = 2
    torch: bool = False  # it may import torch before it is noticed
    writes: str = ""  # the folder that it rightly writes, with progress; all else stays as it was
    searches: bool = False  # it looks into /data and /datasets, which no test can empty


def _build(words: str, says: str, status: int = 2, writes: str = "") -> Mistake:
    return Mistake(f"kamim shards build {words}", says, status, writes=writes)


def _pretrain(words: str, says: str, torch: bool = False) -> Mistake:
    return Mistake(f"kamim pretrain {words}", says, torch=torch)


def _with_model(command: str, says: str) -> Mistake:
    return Mistake(command, says, torch=True)


MISTAKES = (
    # make: variables, values, and what is missing
    Mistake("make shards DATAA=photos", r"DATAA.*\bDATA\b"),
    Mistake("make shards dataset=cifar10", "dataset.*DATASET"),
    Mistake("make pretrain SHARD=sets/good", "SHARD.*SHARDS"),
    Mistake("make shards DATASET=folder", "DATA="),
    Mistake("make shards DATASET=webdataset", "DATA="),
    Mistake("make shards FRAMES=png", "png.*jpeg.*raw"),
    Mistake("make shards FORMAT=zip", "zip.*webdataset.*ffcv"),
    Mistake("make shards DATASET=pets", "pets.*imagenet.*cifar10"),
    Mistake("make shards DATASET=cifar10", "cifar10.*(DATA=|PATH)", searches=True),
    Mistake("make shards DATASET=cifar100 DATA=photos", "100 classes.*--partial"),
    Mistake("make shards DATASET=imagenet SPLIT=train", "imagenet.*(DATA=|PATH)", searches=True),
    Mistake("make shards SPLIT=train", "demo has no split train"),
    Mistake("make shards DETECTOR=fasst", "fasst.*fast"),
    Mistake("make shards BACKEND=slurm", "slurm.*loky.*dask.*ray"),
    Mistake("make shards SCHEDULER=host:8786", "BACKEND|--backend"),
    Mistake("make shards JOBS=two", "--jobs.*integer"),
    Mistake("make verify OUT=sets/nowhere", "sets/nowhere.*(make shards|kamim shards build)"),
    Mistake("make pretrain", "SHARDS=folder"),
    Mistake("make pretrain SHARDS=sets/good RECIPE=smal", "smal.*small"),
    Mistake(
        "make pretrain SHARDS=sets/nowhere RECIPE=small",
        "sets/nowhere.*(make shards|kamim shards build)",
    ),
    Mistake("make pretrain SHARDS=sets/good RECIPE=small FLAGS='--device gpu'", "gpu.*cpu.*cuda"),
    # kamim shards build: words
    _build("photos sets/new --detector sfit", "sfit.*sift"),
    _build("photos sets/new --detector-option fast.treshold=3", "treshold.*threshold"),
    _build("photos sets/new --crop 190", "--crop 190.*192"),
    _build("photos sets/new --jbos 2", "--jbos.*(--jobs|--help)"),
    _build("photos", "(?i)out.*--help"),
    _build("photos sets/warned --frame 100 --map-crops 1", "100.*192", 0, "sets/warned"),
    # kamim shards build: places
    _build("nowhere sets/new", "nowhere.*(give|name)"),
    _build("a-file sets/new", "a-file.*(folder|tar)"),
    _build("empty sets/new", "empty.*(images|jpg)"),
    _build("photos sets/new --split val", "val.*photos|photos.*val"),
    _build("imagenet:photos sets/new", "photos.*imagenet|imagenet.*photos"),
    _build("photos photos/shards", "photos/shards.*(outside|another|elsewhere)"),
    _build("photos a-file", "a-file.*(file|folder)"),
    _build("photos foreign", "foreign.*notes.txt|foreign.*(another|empty)"),
    _build("photos sets/new --reuse foreign", "foreign.*(finished set|shards)"),
    _build(f"photos sets/good {SMALL} --quality 50", "quality.*(another|other|new) (folder|OUT)"),
    _build(f"photos sets/good {SMALL} --detector fast,orb", "--reuse sets/good"),
    _build("spoilt sets/spoilt --on-error fail", "bad.jpg.*quarantine", 1, "sets/spoilt"),
    # sets: damaged, missing, incomplete requests
    _build(f"photos sets/lost {SMALL}", "shard-000001.tar.*--repair", 1),
    _build(f"photos sets/short {SMALL}", "shard-000001.tar.*--repair", 1),
    Mistake("kamim shards verify sets/lost", "--repair", 1),
    Mistake("kamim shards verify sets/flipped", "--repair", 1),
    Mistake("kamim shards inspect foreign", "foreign.*(manifest|finished set|kamim shards build)"),
    Mistake("kamim shards fidelity sets/good", "--source"),
    Mistake("kamim shards convert sets/good --to zip", "zip.*ffcv"),
    Mistake("kamim shards copy sets/nowhere sets/new", "sets/nowhere"),
    # kamim pretrain
    _pretrain("sets/good --recipe vit_bas", "vit_bas.*vit_base"),
    _pretrain("sets/good --reciep small", "--reciep.*(--recipe|--help)"),
    _pretrain("photos --recipe small", "photos.*kamim shards build"),
    _pretrain("sets/good --recipe small --device gpu", "gpu.*cpu.*cuda"),
    _pretrain("sets/good --recipe small --epochs ten", "--epochs.*number"),
    _pretrain(f"sets/lost {RUN} --out runs/new", "shard-000001.tar.*--repair", torch=True),
    _pretrain(f"sets/flipped {RUN} --out runs/new", "shard-000001.tar.*--repair", torch=True),
    _pretrain(f"sets/good {RUN} --out runs/new --detector sift", "sift.*fast", torch=True),
    _pretrain(f"sets/good {RUN} --out runs/new --bank", "kamim shards build .*--bank", torch=True),
    _pretrain(f"sets/good-ffcv {RUN} --out runs/new", "make ffcv", torch=True),
    _pretrain(f"sets/good {RUN} --out runs/new --wandb mine", "wandb.*pip install", torch=True),
    _pretrain(f"sets/good {RUN} --out runs/done", "--resume", torch=True),
    _pretrain(f"sets/good {RUN} --out runs/done --resume auto --seed 1", "seed", torch=True),
    _pretrain(f"sets/good {RUN} --out runs/done --resume auto --epochs 2", "--extend", torch=True),
    Mistake(
        f"kamim pretrain sets/good {RUN} --out runs/done --resume auto",
        "finished.*--extend",
        0,
        torch=True,
    ),
    Mistake(
        "ABSENT=torch kamim pretrain sets/good --recipe small --out runs/new",
        r"torch.*pip install '\.\[train\]'",
    ),
    # what comes after
    _with_model("kamim probe runs/nowhere sets/good sets/good", "runs/nowhere.*timm:NAME"),
    _with_model("kamim probe foreign/notes.txt sets/good sets/good", "notes.txt.*kamim export"),
    _with_model(
        "kamim probe timm:vit_tiny_patch16_224 sets/good sets/good",
        "vit_tiny_patch16_224.*(network|reach|answer)",
    ),
    _with_model(
        "kamim probe random:vit_tinny_patch16_224 sets/good sets/good", "vit_tinny.*vit_tiny"
    ),
    _with_model("kamim finetune runs/done sets/good photos", "photos.*kamim shards build"),
    _with_model("kamim analyse sets/good", "encoder"),
    _with_model("kamim export runs/nowhere new.safetensors", "runs/nowhere.*kamim pretrain"),
    _with_model("kamim export runs/done mine.safetensors", "mine.safetensors exists.*another"),
    _with_model("kamim export-hf foreign/notes.txt new.safetensors", "notes.txt.*kamim export"),
    Mistake("kamim bench --only loader", "loader.*loaders"),
    Mistake("kamim trian sets/good", "trian.*--help"),
    Mistake("kamim shards biuld photos sets/new", "biuld.*(build|--help)"),
)
