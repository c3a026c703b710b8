"""Local tasks of lm-eval, of each kind of request, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "letters": """
output_type: multiple_choice
num_fewshot: 2
fewshot_split: test
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: [A, B, C]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "lambada_like": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{word}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
WORDS = (
    "import return value the a of parser argument help string default action name type def self for in if not".split()
)


def documents(number: int, seed: int = 5) -> list[dict]:
    """Documents that every task can read; some are longer than a small model takes, and some contexts end in a space."""
    draw = random.Random(seed)
    found = []
    for index in range(number):
        question = " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 9, 40]))) + draw.choice(["", ":", " ", "\n"])
        choices = [" " + " ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(3)]
        found.append({"question": question, "choices": choices, "answer": draw.randrange(3), "word": draw.choice(WORDS),
                      "text": " ".join(draw.choices(WORDS, k=draw.choice([1, 5, 60]))), "number": index})  # fmt: skip
    return found


def write_tasks(folder: Path, docs: list[dict] | None = None, names: list[str] | None = None) -> Path:
    """Write a folder of task files and their data; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in (docs or documents(12))), encoding="utf-8")
    for name in names or TASKS:
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + TASKS[name], encoding="utf-8")
    return folder
