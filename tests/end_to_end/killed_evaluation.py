"""An evaluation that kills itself: killed_evaluation.py POINT VISIT CONFIG [option ...].

As killed_run.py; POINT "none" runs to the end. Batches are of three questions.
"""

import sys

from killed_run import COMPILE_CACHE, Bomb, before

from longrl_jax import evaluate


def appending(bomb: Bomb) -> None:
    """Half of a batch's answers are in the file."""
    from longrl_jax.evaluate import drawn

    add = drawn.DrawnLog.add

    def half(self, rows):
        bomb.left -= 1
        if bomb.left == 0:
            bomb.left = 1
            content = b"".join(
                drawn._line(row | {"left": len(rows) - i}) for i, row in enumerate(rows, start=1)
            )
            self._file.write(content[: len(content) // 2])
            bomb()
        add(self, rows)

    drawn.DrawnLog.add = half


def answering(bomb: Bomb) -> None:
    """The engine has drawn some tokens of the answers."""
    from rollout_bridge import vllm_engine

    before(vllm_engine.BannedTokens, "apply", bomb)


def scoring(bomb: Bomb) -> None:
    """A mode is answered, nothing of it is judged."""
    from longrl_jax.evaluate import answering

    before(answering, "judged", bomb)


POINTS = {point.__name__: point for point in (appending, answering, scoring)}


def main() -> None:
    point, visit, *words = sys.argv[1:]
    evaluate.COMPILE_CACHE = COMPILE_CACHE
    prepare = evaluate.platform.prepare

    def prepared(*args, **kwargs):
        prepare(*args, **kwargs)
        from longrl_jax.stages import evaluation

        evaluation.MAX_QUESTIONS = 3
        if point != "none":
            POINTS[point](Bomb(int(visit)))

    evaluate.platform.prepare = prepared
    evaluate.main(words)


if __name__ == "__main__":
    main()
