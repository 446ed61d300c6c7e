r"""The reward of mathematics: what is equal, what the form is, and what a hostile answer costs."""

import pytest
import sympy

from longrl_jax import rewards
from longrl_jax.rewards import math_answer, math_verdicts, video_qa
from longrl_jax.types import Example, Scored

EQUAL = [  # (reference, answer): pairs that math-verify's own tests call right
    ("-5", "-5"),
    ("7425000", "7,425,000"),
    ("1000", "1000.0"),
    ("10/9", r"\frac{10}{9}"),
    ("1/3", r"\frac13"),
    ("1/3", r"\left( \frac{1}{3} \right)"),
    ("1/3", r"\frac{1}{3} \text{meters}"),
    (r"\sqrt{3}", r"\sqrt3"),
    ("[0,1)", "[0,1)"),
    (r"28\%", "28"),
    ("2-2p", "2-2p"),
    (r"15\mbox{ cm}^2", r"15\text{ cm}^2"),
    ("-2,1", "-2,1"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"90^\circ", "90"),
    ("204_5", "204_5"),
    (r"1 \pm \sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2,1\pm\sqrt{5}\}"),
    ("f(2) < f(1) < f(4)", "f(2) < f(1) < f(4)"),
    (r"2 \sin b \cos a", r"2 \cos a \sin b"),
    (r"\frac{9}{4}\pi", r"\frac94\pi"),
    (r"x \leq 5", r"5 \geq x"),
    ("11", "x=11"),
    ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}"),
    (r"(1,\frac{9}{2})", "(1,4.5)"),
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
    (r"\tan^2(y)+1", r"\sec^2(y)"),
    (
        r"\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix}",
        r"\left[\begin{array}{cc}1 & 2 \\3 & 4\end{array}\right]",
    ),
]
OTHER = [  # and pairs that they call wrong, or we do
    ("0.28", "28"),
    ("28", "28/100"),
    ("[0,9)", "[0,1)"),
    ("(0,9)", "[0,9)"),
    ("x > 5", "x < 5"),
    ("7 = 11a+c", "11a+c"),
    ("a^2 + b = 0", "0"),
    ("(3,1)", r"\{1,3\}"),
    (r"\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix}", r"\begin{pmatrix}1 & 2 \\3 & 5\end{pmatrix}"),
    ("12", "twelve"),
    ("12", ""),
    ("12", "{12"),
    ("x", "y"),
]


def scored(text, answer="12", template="boxed"):
    example = Example(id="1", question="how many?", answer=answer)
    return Scored(example=example, text=text, num_tokens=5, finish_reason="stop", template=template)


def test_equal_is_what_has_the_same_value():
    got = dict(zip(EQUAL + OTHER, math_answer.verdicts(EQUAL + OTHER), strict=True))
    assert not [pair for pair in EQUAL if got[pair] != "right"]
    assert not [pair for pair in OTHER if got[pair] != "wrong"]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"<think>6 and 6</think>\boxed{12}", True),
        ("<think>6\nand 6</think>\nSo it is\n" r"\boxed{\frac{24}{2}} apples.", True),
        (r"<think>\boxed{6} twice</think>\boxed{12}", True),
        (r"<think></think>\boxed{12}", True),
        (r"Well <think>6</think>\boxed{12}", False),
        (r"<think>6</think><think>6</think>\boxed{12}", False),
        (r"<think>\boxed{12}</think> 12", False),
        (r"<think>6</think>\boxed{6}\boxed{12}", False),
        (r"<think>6</think>\boxed{}", False),
        (r"<think>6</think>\boxed{12", False),
        (r"\boxed{12}<think>6</think>", False),
        (r"\boxed{12}", False),
        ("", False),
    ],
)
def test_form(text, form):
    assert math_answer.has_form(text) is form


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} no, \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} {}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1", ""),
        (r"\boxed 1", ""),
        (r"\fbox{1}", ""),
    ],
)
def test_the_last_box_counts(text, inside):
    assert math_answer.boxed(text) == inside


def test_total_is_mostly_the_answer():
    texts = [r"<think>a</think>\boxed{12}", r"\boxed{12}", r"<think>a</think>\boxed{13}", "12"]
    got = rewards.score([scored(text) for text in texts], {"math_answer": 1.0})
    assert [parts["total"] for parts in got] == [1.0, 0.9, 0.1, 0.0]
    assert [parts["math_answer/format"] for parts in got] == [1, 0, 1, 0]
    assert [parts["math_answer/accuracy"] for parts in got] == [1, 1, 0, 0]
    (bare,) = math_answer.reward([scored(r"\boxed{0.5}", answer=r"$\boxed{\frac12}$")])
    assert bare["accuracy"] == 1


def test_an_answer_without_end_is_wrong_and_counted(monkeypatch):
    """A power of large integers is one call into C, which no alarm interrupts."""
    monkeypatch.setattr(math_answer, "MAX_CPU_S", 1)
    boxes = [r"\boxed{12}", r"\boxed{9^{9^{9^9}}}", r"\boxed{10000000!}", r"\boxed{\frac{24}{2}}"]
    got = math_answer.reward([scored(text) for text in boxes])
    assert [parts["accuracy"] for parts in got] == [1, 0, 0, 1]
    assert [parts["gave_up"] for parts in got] == [0, 1, 1, 0]


def test_an_answer_is_never_executed(tmp_path):
    mark = tmp_path / "executed"
    code = f"__import__('os').system('touch {mark}')"
    forms = ["{}", r"\text{{{}}}", r"\{{1, \text{{{}}}\}}", r"(\mathrm{{{}}}, 2)", r"[{}, 2]"]
    assert "right" not in math_answer.verdicts([("3", form.format(code)) for form in forms])
    assert not mark.exists()
    for text in (code, "Symbol('x').__class__", "(lambda: 1)()", "Integer(Integer.mro)"):
        with pytest.raises(ValueError, match="more than a number or a name"):
            math_verdicts._evaluate_names(text, {}, vars(sympy))
    assert math_verdicts._evaluate_names(" Float('0.5' )", {}, vars(sympy)) == 0.5


def test_rewards_refuse_the_form_of_another():
    with pytest.raises(ValueError, match="set data.template=boxed"):
        math_answer.reward([scored(r"\boxed{12}", template="think")])
    with pytest.raises(ValueError, match="data.template='boxed' is unknown; choose one of direct"):
        video_qa.reward([scored(r"\boxed{12}")])
