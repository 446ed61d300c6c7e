r"""Judges (reference, answer) pairs of mathematics; a program that math_answer.py runs.

    python math_verdicts.py MAX_CPU_S < pairs.json

Standard input: a JSON list of pairs. Standard output: a JSON list of "right", "wrong" and "gave
up". Every pair is judged in a process of its own with limits that the system enforces, so that
neither a loop in C code (the power of large integers) nor memory can hold up training; an alarm
inside the process, which is math-verify's own way, does not end those. CPU time counts, not the
clock: on a busy machine the verdicts are the same.
"""

import ast
import json
import logging
import os
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

MAX_BYTES = 2 * 2**30
"""Address space of one judge; SymPy itself takes 60 MB."""
RIGHT, WRONG = 10, 11
"""Exit codes of a judge; any other end means that it gave up."""
NUMBERS = "Integer", "Float", "Rational", "Symbol"
PLAIN = ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.UnaryOp, ast.USub
WORDS = {RIGHT: "right", WRONG: "wrong"}


def main() -> None:
    max_cpu_s = int(sys.argv[1])
    logging.disable(logging.CRITICAL)  # else a line about every expression that is none
    sympy_parser.eval_expr = _evaluate_names
    pairs = json.load(sys.stdin)
    words = ["gave up"] * len(pairs)
    waiting: list[tuple[int, tuple[str, str]]] = list(enumerate(pairs))
    judges: dict[int, int] = {}
    while waiting or judges:
        while waiting and len(judges) < (os.cpu_count() or 1):
            index, (reference, answer) = waiting.pop()
            pid = os.fork()
            if pid == 0:
                _judge(reference, answer, max_cpu_s)
            judges[pid] = index
        pid, status = os.wait()
        index = judges.pop(pid)
        if os.WIFEXITED(status):
            words[index] = WORDS.get(os.WEXITSTATUS(status), "gave up")
    json.dump(words, sys.stdout)


def _judge(reference: str, answer: str, max_cpu_s: int) -> None:
    """Ends this process with the verdict."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_s, max_cpu_s))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        wanted, given = _read(reference), _read(answer)
        code = RIGHT if verify(wanted, given, timeout_seconds=None) else WRONG
    finally:
        os._exit(code)


def _read(text: str) -> list:
    """As LaTeX alone: math-verify's reader of plain expressions would evaluate Python."""
    rule = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(rf"\boxed{{{text}}}", rule, parsing_timeout=None)


def _evaluate_names(code: str, local: dict, known: dict) -> object:
    """Stands for what SymPy evaluates strings with, as Python: only a number or a name passes.

    The reader of LaTeX asks for no more; no word that a policy wrote is ever executed.
    """
    for node in ast.walk(ast.parse(code.strip(), mode="eval")):
        made = not isinstance(node, ast.Call) or ast.unparse(node.func) in NUMBERS
        if not (made and isinstance(node, PLAIN)):
            raise ValueError(f"{code!r} is more than a number or a name")
    return eval(code, known, local)


if __name__ == "__main__":
    main()
