"""Long prompts with short answers, from a file in SQuAD's JSON: the passage that a question is
about, somewhere among others.

    python scripts/long_rows.py SQUAD.json rows.jsonl [--characters 16000] [--rows 500]

About four characters are a token. Rows are `prompt` + `completion`, as `objective: sft` reads them.
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description="Long question-answering rows.")
    parser.add_argument("squad", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=16000)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    articles = json.loads(args.squad.read_text("utf-8"))["data"]
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    draw = random.Random(args.seed)
    questions = [(p, q) for p in paragraphs for q in p["qas"]]
    draw.shuffle(questions)
    with args.out.open("w", encoding="utf-8") as file:
        for paragraph, question in questions[: args.rows]:
            parts, size = [paragraph["context"]], len(paragraph["context"])
            while size < args.characters:
                other = draw.choice(paragraphs)["context"]
                parts.insert(draw.randint(0, len(parts)), other)
                size += len(other)
            prompt = "\n\n".join(parts) + f"\n\nQuestion: {question['question']}\nAnswer:"
            row = {"prompt": prompt, "completion": " " + question["answers"][0]["text"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"{args.out}: {min(args.rows, len(questions))} rows of about {args.characters} characters"
    )


if __name__ == "__main__":
    main()
