"""One training run: flags, checkpoints, resume.

flags -> data -> classifier -> objective -> epochs -> checkpoint
"""

import inspect
from argparse import Namespace

import torch
from tqdm import tqdm

from spacte import checkpoint, cli
from spacte.data import DATASETS, open_split
from spacte.device import select_device
from spacte.model import ARCHITECTURES, build_classifier
from spacte.objective import Objective
from spacte.processes import main_process_first, process_rank, share_from_main_process, start_processes
from spacte.runlog import RunLog, RunPaths
from spacte.trainer import Trainer
from spacte.utils import UserError, source_sha256

# Flags that a resumed run may change: they say where and how it runs, not what it computes.
_FREE_FLAGS = {"data_dir", "logs_dir", "save_dir", "runs_dir", "save_freq", "device", "workers", "resume"}
# Flags that older checkpoints do not know, with the value that they then had.
_ADDED_FLAGS = {"no_teaching": False, "no_cosine": False}


def main(objective: type[Objective], description: str, lbdlast: float) -> None:
    """The command line of a defence's train.py; `lbdlast` is its default pace."""
    cli.run(lambda: train(_flags(objective, description, lbdlast).parse_args(), objective))


def _flags(objective: type[Objective], description: str, lbdlast: float) -> cli.Parser:
    parser = cli.Parser(description)
    add = parser.add_argument
    add("--dataset", default="CIFAR10", help=f"one of {', '.join(DATASETS)}")
    add("--data_dir", default="./data", help="where the data set's files are, or are downloaded to")
    add("--arch", default="R110", help=f"one of {', '.join(ARCHITECTURES)}")
    add("--num_heads", type=cli.positive_int, default=5, help="L; 1 is the base defence alone")
    add("--noise_sd", type=cli.positive_float, default=0.25, help="sigma, in units of [0, 1]")
    add("--num_noise_vec", type=cli.positive_int, default=2, help="m, noise vectors an image")
    add("--lbdlast", type=cli.pace, default=lbdlast, help="lambda, the pace of teaching, in the last epoch")
    add("--eps", type=cli.probability, default=0.8, help="the best head's share in the loss is 1 - eps")
    add("--no_teaching", action="store_true", help="every sample weighs 1: the heads do not teach each other")
    add("--no_cosine", action="store_true", help="without the cosine constraint between the heads")
    add("--train_images", type=cli.positive_int, help="train on the first images of each class, this many in all")
    objective.add_flags(parser)
    add("--epochs", type=cli.positive_int, default=150, help="passes over the training images")
    add("--batch_size", type=cli.positive_int, default=256, help="images a batch, over all processes")
    add("--lr_init", type=cli.positive_float, default=0.1, help="first learning rate")
    add("--lr_step_size", type=cli.positive_int, default=50, help="epochs between drops of the learning rate")
    add("--gamma", type=cli.positive_float, default=0.1, help="factor of such a drop")
    add("--wd", type=cli.non_negative_float, default=1e-4, help="weight decay")
    add("--seed", type=cli.seed, default=666, help="of the weights, the order and the noise")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network's arithmetic")
    add("--compile", action="store_true", help="through torch.compile; no faster on the CPUs we tried")
    add("--workers", type=cli.non_negative_int, default=4, help="processes that read ImageNet's files")
    add("--save_freq", type=cli.positive_int, default=10, help="epochs between checkpoints")
    add("--save_dir", default="./save", help="checkpoints: <save_dir>/<dataset>/<arch>/noise-<sd>/<run>/epochN.pth")
    add("--logs_dir", default="./logs", help="text logs")
    add("--runs_dir", default="./runs", help="TensorBoard files")
    add("--resume", action="store_true", help="go on after the newest whole checkpoint of this run, if there is one")
    return parser


def run_name(args: Namespace, objective: type[Objective]) -> str:
    """The authors' name of a run, h-5-eps-0.8-m-2-lbdlast-1.2 and what the defence adds."""
    name = f"h-{args.num_heads}-eps-{args.eps}-m-{args.num_noise_vec}-lbdlast-{args.lbdlast}"
    name += objective.run_suffix(args) + "-no-teaching" * args.no_teaching + "-no-cosine" * args.no_cosine
    return name if args.train_images is None else f"{name}-images-{args.train_images}"


def train(args: Namespace, objective_type: type[Objective]) -> None:
    """Train as the flags say, and leave checkpoints, a text log and TensorBoard files.

    Raises UserError before anything is written where a flag, file or folder is wrong, and RunError with the epoch, the
    step and every part where the loss is not finite.
    """
    if args.batch_size < args.num_noise_vec:
        raise UserError(f"--batch_size {args.batch_size} is smaller than --num_noise_vec {args.num_noise_vec}")
    start_processes()
    device = select_device(args.device, args.compile)
    run = run_name(args, objective_type)
    paths = RunPaths.of(args, run)
    resumed = share_from_main_process(lambda: _resume_point(paths, args, objective_type.name))
    where = (args.dataset, args.data_dir)
    train_split = main_process_first(lambda: open_split(*where, True, device, args.workers))
    if args.train_images is not None:
        train_split.keep_first_of_each_class(args.train_images)
    test_split = main_process_first(lambda: open_split(*where, False, device, args.workers, train_split.spec))
    torch.manual_seed(args.seed)
    classifier = build_classifier(args.arch, train_split.spec, args.num_heads)
    objective = objective_type(args, train_split.spec.num_classes)
    trainer = Trainer(args, device, classifier, objective, train_split, test_split)
    if resumed:
        trainer.restore(resumed)
    if trainer.epoch == args.epochs:
        print(f"{paths.checkpoint(args.epochs)} is the last epoch: nothing is left to do")
        return
    share_from_main_process(paths.make_folders)
    log = RunLog(paths, trainer.epoch, args.epochs) if process_rank() == 0 else None
    source = source_sha256(inspect.getfile(objective_type))
    about = {"run": run, "defence": objective.name, "args": vars(args), "source_sha256": source}
    for row in trainer.epochs():
        if log:
            log.write(row)
        epoch = row["epoch"]
        if epoch in (1, args.epochs) or epoch % args.save_freq == 0:
            state = trainer.state()  # every process has its part in it
            if log:
                checkpoint.save(paths.checkpoint(epoch), {**state, **about})
    if log:
        print(f"checkpoint: {paths.checkpoint(args.epochs)}\nlog: {paths.log}\nTensorBoard: {paths.tensorboard}")


def _resume_point(paths: RunPaths, args: Namespace, defence: str) -> dict | None:
    """The newest whole checkpoint of the run where --resume asks for one.

    Raises UserError where the run has checkpoints and --resume is not given, or was made with other flags or by
    another defence.
    """
    found = paths.epochs()
    if found and not args.resume:
        raise UserError(
            f"'{paths.checkpoints}' already holds epoch{found[0]}.pth: give --resume to go on from there, or another "
            "--save_dir"
        )
    for epoch in found:
        try:
            contents = checkpoint.read(paths.checkpoint(epoch))
        except UserError as error:
            tqdm.write(f"passed over: {error}")
            continue
        if not {"args", "defence", "data", "rng", "optimizer", "scheduler", "epoch"} <= contents.keys():
            raise UserError(f"'{paths.checkpoint(epoch)}' is no checkpoint of train.py: it cannot be resumed")
        if contents["defence"] != defence:
            raise UserError(f"the run in '{paths.checkpoints}' was trained by {contents['defence']}, not by {defence}")
        for name, value in vars(args).items():
            if name not in _FREE_FLAGS and contents["args"].get(name, _ADDED_FLAGS.get(name)) != value:
                raise UserError(
                    f"--{name} {value} contradicts the run in '{paths.checkpoints}', which has {name} "
                    f"{contents['args'].get(name)}"
                )
        return contents
    return None
