"""The knobs: every one once, with unit, default and reason. `burnish recipe explain` prints this file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from burnish.recipe.checks import CheckSection

Auto = Literal["auto"]
MAX_LEAVES = 75  # the design's 70, and what evidence needs: documents, endpoint, price, checks, retention


def _from_scalar(key: str) -> BeforeValidator:
    """`model: NAME` and `data: FILE` are short for `model: {name: NAME}` and `data: {train: FILE}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSection(_Section):
    name: str = Field(min_length=1, description="embedded name (`gemma-3-270m`), local folder, or Hugging Face id (extra `hub`)")
    chat_template: str = Field(
        "auto",
        description="`auto`: the tokenizer's own, else `plain`; or a shipped name (`plain`, `chatml`), or a .jinja file. It travels with the adapter",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="compute type of the base weights; `auto`: bfloat16 where this machine multiplies it fast, else float32"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="`auto`: cuda if there is one, else cpu")


class DataSection(_Section):
    train: str = Field(
        min_length=1,
        description="rows to learn from: .jsonl, .csv, .parquet (extra), hub:ID (extra), or `demo:home-assistant/en`; for plain text a .txt, a .md, or a folder",
    )
    validation: str | None = Field(None, description="rows to choose on (prompt form, shots, checkpoint); none: split off `train`")
    test: str | None = Field(None, description="rows for the verdict, read at the end; none: split off `train`")
    format: Literal["auto", "chat", "completion", "alpaca", "sharegpt", "columns", "text", "preference"] = Field(
        "auto", description="`auto`: recognised from the rows; none or two fitting is an error"
    )
    prompt_column: str | None = Field(None, description="for plain columns and CSV: the column of the question")
    completion_column: str | None = Field(None, description="for plain columns and CSV: the column of the answer")
    context_column: str | None = Field(None, description="a column put before the question (a schema, an article)")
    documents: str | None = Field(
        None,
        description="what a model without training may look up: a file or folder of texts, or rows (.jsonl, .csv); none: no retrieval from documents",
    )
    group_column: str | None = Field(
        None, description="rows of one group (user, source, template) never part at a split; none: each row alone"
    )
    system: str | None = Field(None, description="a system prompt put before every row that has none")
    train_rows: int | None = Field(None, ge=1, description="at most so many training rows, drawn by hash; none: all")
    validation_rows: int | None = Field(None, ge=1, description="at most so many validation rows; none: all")
    test_rows: int | None = Field(None, ge=1, description="at most so many test rows; none: all")
    validation_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of groups split off for validation when no file is given")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of groups split off for test when no file is given")
    max_length: int = Field(1024, ge=16, le=131072, description="tokens; a longer row is treated by `over_length`, never cut silently")
    over_length: Literal["error", "drop", "truncate-prompt"] = Field(
        "error",
        description="`error`: name the rows · `drop`: leave out, counted · `truncate-prompt`: cut the start of the longest user text",
    )
    overlap_ngram: int = Field(
        13,
        ge=0,
        description="words; training rows that share such a run with validation or test are removed and counted (GPT-3 paper, app. C); 0: exact only",
    )


class TaskSection(_Section):
    metric: str = Field("auto", description="`auto`: chosen from the training answers; a name of METRICS, or your own `file.py:function`")
    instruction: str | None = Field(None, description="what an untrained model is told; none: written from the training rows")


class LoraSection(_Section):
    rank: int = Field(16, ge=1, le=1024, description="r of LoRA (arXiv 2106.09685)")
    alpha: float = Field(32.0, gt=0, description="scale = alpha ÷ rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input; 0: short runs on little data are steadier without")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="PEFT's rule: `all-linear` (all but the head), or module names; all layers beat attention alone (QLoRA, arXiv 2305.14314)",
    )


class TrainingSection(_Section):
    method: Literal["lora", "rslora", "dora", "qlora", "full"] = Field("lora", description="what is trained: a row of METHODS")
    objective: Literal["supervised", "text", "preference"] = Field(
        "supervised",
        description="`supervised`: the answers · `text`: every token of plain text (continued pre-training) · `preference`: DPO on chosen and rejected answers",
    )
    layers: str | list[Annotated[int, Field(ge=0)]] = Field(
        "all",
        description="which decoder layers are trained, with any method: `all`, `last-8`, `first-4`, a list of numbers, or a regex found in module names",
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] | Auto = Field(
        "auto", description="peak; `auto`: found by a short range test on training rows, written into the run"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after warm-up, down to a tenth of the peak (cosine), to 0 (linear), or flat"
    )
    warmup_fraction: float = Field(0.05, ge=0, le=0.5, description="share of the steps in which the rate rises from 0")
    epochs: float = Field(3.0, gt=0, le=100, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="optimizer updates at most; none: what `epochs` gives")
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto = Field(
        "auto",
        description="examples computed at once; `auto`: 8, or fewer (with more accumulation) where a dry step on the longest rows says memory asks for it",
    )
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="micro-batches per step; 1×8 equals 8×1 up to rounding")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="AdamW's decoupled decay, on the trained weights")
    max_gradient_norm: float = Field(1.0, gt=0, description="clip the gradient's norm here")
    validations_per_epoch: int = Field(
        2, ge=1, le=100, description="how often the validation loss is measured; the best checkpoint is kept"
    )
    early_stopping_patience: int = Field(4, ge=0, description="stop after so many validations without a better loss; 0: never")
    checkpoint_steps: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto",
        description="steps between checkpoints from which a run that was cut off goes on; `auto`: about every two minutes, and at every validation",
    )
    preference_beta: float = Field(0.1, gt=0, le=10, description="DPO's β (arXiv 2305.18290): how far the model may move from its base")
    replay_data: str | None = Field(
        None, description="general rows mixed into training against forgetting: a data file like data.train; none: no replay"
    )
    replay_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of replayed rows among all that are trained on, where replay_data is given"
    )
    kl_weight: float = Field(
        0.0,
        ge=0,
        le=100,
        description="weight of KL(base ‖ tuned) on the target rows, nats, against forgetting; 0: none (costs one more forward pass)",
    )


class EngineSection(_Section):
    """How a step is computed. Every fast path gives the same loss and gradients as the plain one; turn one off to compare."""

    document_attention: bool = Field(
        True, description="attention for each packed sequence alone; false: transformers' dense mask over the whole row"
    )
    blocked_head: bool = Field(
        True, description="the vocabulary head on target rows only, in blocks, logits never whole; false: full logits"
    )
    shared_prefixes: bool = Field(
        True, description="what the sequences of a micro-batch begin with in common is computed once, forward and backward"
    )
    fused_layers: bool = Field(
        True, description="norms, gated MLP and LoRA as one autograd step each, with less kept for the backward pass"
    )
    compiled_kernels: bool = Field(
        True,
        description="on a CPU with a C compiler: what is between the products in one pass over memory each; false: torch's own operations",
    )
    length_buckets: bool = Field(True, description="sequences of like length in one batch; the order stays a function of the seed")
    gradient_checkpointing: bool | Auto = Field(
        "auto", description="compute each layer's activations again on the way back; `auto`: where a dry step says memory asks for it"
    )
    frozen_cache: bool | Auto = Field(
        "auto",
        description="keep the output of frozen lower layers on disk across epochs; `auto`: where it saves a third of the work and the disk has room",
    )
    compile: bool | Auto = Field(
        "auto", description="torch.compile, layer by layer; `auto`: on a GPU in runs long enough to earn its start-up"
    )
    base_products: Literal["native", "int8"] = Field(
        "native",
        description="`int8`: the frozen base multiplies in 8 bits on a CPU with VNNI; faster, not exact (docs/performance.md has the loss)",
    )


class GateSection(_Section):
    measure: Literal["validation_loss", "validation_score", "retention_loss"] = Field(
        "validation_loss",
        description="`validation_loss`, `validation_score` (the task's metric): on this stage's validation rows · `retention_loss`: on rows of `data`, or on a held-back share of training.replay_data",
    )
    data: str | None = Field(None, description="rows on which `retention_loss` is measured; none: the stage's training.replay_data")
    max_increase: float | None = Field(
        None, description="nats per token that the loss may rise above the start of the stage; 0: it must not rise"
    )
    min_gain: float | None = Field(None, description="what the stage must bring at least: nats for a loss, a fraction for a score")

    @model_validator(mode="after")
    def _asks_something(self) -> GateSection:
        if self.max_increase is None and self.min_gain is None:
            raise ValueError("a gate asks for `max_increase` or `min_gain`: give one, or leave the gate out")
        if self.max_increase is not None and self.measure == "validation_score":
            raise ValueError("`max_increase` is about a loss; for `validation_score` give `min_gain` (a negative one allows a fall)")
        if self.data is not None and self.measure != "retention_loss":
            raise ValueError("`data` of a gate are rows for `measure: retention_loss`")
        return self


class StageSection(_Section):
    """One stage of a chain: what it changes of the recipe, and the gate after it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="the stage's folder is RUN/stages/NAME")
    data: Annotated[dict[str, Any], _from_scalar("train")] = Field(
        default_factory=dict,
        description="keys of `data` that differ in this stage; a text is short for {train: TEXT}. With rows of its own, what belongs to a file (columns, splits, row counts) starts from its default",
    )
    training: dict[str, Any] = Field(default_factory=dict, description="keys of `training` that differ in this stage")
    lora: dict[str, Any] = Field(default_factory=dict, description="keys of `lora` that differ in this stage")
    gate: GateSection | None = Field(None, description="what must hold on validation rows for the chain to go on")


class EndpointSection(_Section):
    """A larger model behind an address that speaks OpenAI's chat protocol."""

    base_url: str = Field(pattern=r"^https?://", description="where it answers, up to and with /v1")
    model: str = Field(min_length=1, description="the model's name there")
    key_variable: str | None = Field(
        "OPENAI_API_KEY", description="the NAME of the environment variable that holds the key; none: no key is sent"
    )
    price_in: float = Field(0.0, ge=0, description="for a million tokens read, in the currency of `max_spend`")
    price_out: float = Field(0.0, ge=0, description="for a million tokens written")
    max_spend: float = Field(1.0, gt=0, description="no request is sent that could bring the run above it")
    requests_per_minute: float | None = Field(None, gt=0, description="at most; none: as fast as it answers")


class EvaluationSection(_Section):
    candidates: (
        list[Literal["base", "few_shot", "few_shot_retrieved", "neighbours", "rag", "rag_few_shot", "endpoint", "tuned", "tuned_rag"]]
        | Auto
    ) = Field(
        "auto",
        description="what is measured on the same test rows; `auto`: all that the recipe has what they need (`data.documents`, `evaluation.endpoint`)",
    )
    endpoint: EndpointSection | None = Field(
        None,
        description="a larger general model to compare with: base_url, model, key_variable, price_in, price_out, max_spend; none: it is not asked",
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="of this machine, in any currency: turns measured seconds into costs; none: costs are told in seconds"
    )
    shots: list[Annotated[int, Field(ge=1, le=64)]] = Field(
        [4, 16], min_length=1, description="numbers of examples tried on validation rows; the best is kept"
    )
    prompt_forms: list[Literal["as_is", "instructed"]] = Field(
        ["as_is", "instructed"], min_length=1, description="ways to ask an untrained model, tried on validation rows; the best is kept"
    )
    selection_rows: int = Field(24, ge=4, description="validation rows on which form and shots are chosen")
    max_new_tokens: Annotated[int, Field(ge=1, le=32768)] | Auto = Field(
        "auto", description="tokens; `auto`: 1.25 × the longest training answer + 8"
    )
    batch_size: int = Field(32, ge=1, le=1024, description="requests generated at once")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="of every interval; 1 − this is the verdict's error rate over all comparisons"
    )
    resamples: int = Field(10_000, ge=200, le=1_000_000, description="of the paired bootstrap and the sign-flip test")
    checks: list[CheckSection] | None = Field(
        None,
        description="what answers must keep to besides being right, each `- NAME: SETTINGS` (recipe/checks.py lists them); none: what the training answers show and costs nothing",
    )

    @model_validator(mode="after")
    def _has_what_they_need(self) -> EvaluationSection:
        if isinstance(self.candidates, list):
            if not self.candidates:
                raise ValueError("`candidates` names none: leave it out for all of them, or name some")
            if "endpoint" in self.candidates and self.endpoint is None:
                raise ValueError("the candidate `endpoint` needs `evaluation.endpoint` with its base_url and model")
        return self


class RetainSection(_Section):
    """What must not be forgotten. `burnish run` measures it where one of these keys is given; `burnish retain RUN` always does."""

    suites: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        min_length=1,
        description="`embedded`, files or folders of suites or of your own must-still-work prompts, `lm-eval:TASK` (extra `harness`); none: the embedded ones",
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        le=1,
        description="what may be lost, as a fraction: 0.02 is 2 points, or 2 % more bits; exit code 3 where more was lost even at the better end of the interval, 4 where it can't tell; none: no gate",
    )

    @property
    def given(self) -> bool:
        return self.suites is not None or self.max_drop is not None


class Recipe(_Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the run's folder is ./runs/NAME")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of the split, the order, the adapter's start and the resampling")
    model: Annotated[ModelSection, _from_scalar("name")] = Field(description="the base model")
    data: Annotated[DataSection, _from_scalar("train")] = Field(description="the rows")
    task: TaskSection = Field(default_factory=TaskSection, description="what good means")  # type: ignore[arg-type]
    lora: LoraSection = Field(default_factory=LoraSection, description="the adapter's size")  # type: ignore[arg-type]
    training: TrainingSection = Field(default_factory=TrainingSection, description="the loop")  # type: ignore[arg-type]
    engine: EngineSection = Field(default_factory=EngineSection, description="how a step is computed")  # type: ignore[arg-type]
    stages: list[StageSection] | None = Field(
        None, description="a chain, each stage with its own data, method and budget, continuing from the one before; none: one training"
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="the proof")  # type: ignore[arg-type]
    retain: RetainSection = Field(default_factory=RetainSection, description="what must not be forgotten")  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        data = self.data
        if (data.prompt_column is None) != (data.completion_column is None):
            raise ValueError("data.prompt_column and data.completion_column go together: name both or neither")
        if data.format == "columns" and data.prompt_column is None:
            raise ValueError("data.format: columns needs data.prompt_column and data.completion_column")
        if data.train.startswith("demo:"):
            given = [
                k
                for k in ("validation", "test", "prompt_column", "completion_column", "context_column", "group_column", "system")
                if getattr(data, k)
            ]
            if given or data.format != "auto":
                raise ValueError(
                    f"data.{(given or ['format'])[0]} does not go with the embedded data {data.train}, which brings its own splits: leave it out"
                )
        if data.validation is None and data.test is None and data.validation_fraction + data.test_fraction >= 0.9:
            raise ValueError("data.validation_fraction + data.test_fraction leave too little to train on")
        reading = [name for name in self.evaluation.candidates if "rag" in name]
        if isinstance(self.evaluation.candidates, list) and reading and data.documents is None:
            raise ValueError(
                f"the candidate `{reading[0]}` looks things up in `data.documents`: name a file or folder there, or leave the candidate out"
            )
        self._against_forgetting()
        self._chained()
        return self

    def _against_forgetting(self) -> None:
        training = self.training
        if training.objective == "preference":
            if self.data.format not in ("auto", "preference") or self.data.train.startswith("demo:"):
                raise ValueError(
                    f"training.objective: preference needs rows with a chosen and a rejected answer, which data ({self.data.train}, "
                    f"format {self.data.format}) cannot have: give data.format preference or auto, or set training.objective: supervised"
                )
            given = [key for key, unset in (("replay_data", None), ("kl_weight", 0.0)) if getattr(training, key) != unset]
            if given:
                raise ValueError(
                    f"training.{given[0]} goes with training.objective supervised or text: a preference is held near its start by "
                    "training.preference_beta already. Leave it out"
                )
        if training.kl_weight and training.method == "full":
            raise ValueError(
                "training.kl_weight compares with the base model, which is the model without its adapter; training.method full has none. "
                "Choose lora, rslora, dora or qlora, or set kl_weight: 0"
            )

    def _chained(self) -> None:
        names = [stage.name for stage in self.stages or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: a name is given twice ({', '.join(names)}); each stage has a folder of its own")
        for stage in self.stages or ():
            replay = stage.training.get("replay_data", self.training.replay_data)
            if stage.gate is not None and stage.gate.measure == "retention_loss" and stage.gate.data is None and replay is None:
                raise ValueError(f"stages.{stage.name}.gate: retention_loss needs rows: give the gate `data`, or training.replay_data")

    @model_validator(mode="after")
    def _plain_text(self) -> Recipe:
        """`training.objective: text` and what does not go with it."""
        if (self.data.format == "text") != (self.training.objective == "text") and self.data.format != "auto":
            raise ValueError(
                f"data.format: {self.data.format} does not go with training.objective: {self.training.objective}; plain text is `text` in both"
            )
        if self.training.objective != "text":
            return self
        given = [key for key in ("prompt_column", "completion_column", "context_column", "system") if getattr(self.data, key)]
        if given or self.data.train.startswith("demo:"):
            raise ValueError(f"data.{(given or ['train'])[0]} is about questions and answers and does not go with training.objective: text")
        if self.task.metric not in ("auto", "bits_per_byte"):
            raise ValueError("task.metric judges answers; plain text is judged by bits_per_byte: leave it out")
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
