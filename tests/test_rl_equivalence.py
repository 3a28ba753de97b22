r"""Which answers are right: tables of what models write, in the styles of GSM8K and MATH.

In every table: the expected answer, and what a model wrote for it.
"""

from rl.problems import Problem
from rl.verdict.mathematics.equivalence import same_maths, same_number
from rl.verdict.mathematics.quantities import core, plain
from rl.verdict.rules import accuracy
from tests.tables import each


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(expected, given) for expected, answers in table.items() for given in answers]


# ---- a number is expected, and the answer is marked ---------------------------------------------

RIGHT_NUMBERS = {
    "5": [
        "5 times as many", r"5\text{ times}", "5th", r"5^{\text{th}}", r"5^\text{th}",
        r"5\text{th}", "5^{th}", r"\therefore x = 5", r"\text{x} = 5", r"\text{\$}5", "May 5",
        r"\$5.00\text{ per hour}", r"5 \text{ (five)}", "5 ", "$5 per day", "5 a day",
        r"\angle ABC = 5", "f(2) = 5", "S_{10} = 5", "|AB| = 5", "AB = 5", "x = 2 + 3 = 5",
        "2+3=5", "The answer is 5", "The answer is 5.", "So Ann has 5 apples left.",
        "Ann has a total of 5 apples", "5 (five)", r"\text{The answer is } 5", "Total: 5",
        "5 apples and oranges", r"5\text{ units}", r"x \approx 5", "+5", r"5\,", "5 km",
        r"5\text{ km}", "€5", "£5", "5 boys", "5 men", "5 eggs", r"\mathbf{5}", r"\textbf{5}",
        r"\displaystyle 5", r"\left(5\right)", "n=5", "n = 5.", "5-inch",
        r"5\text{ kg}\cdot\text{m/s}^2", r"5 \text{N}",
    ],
    "1": ["1 point"],
    "21": ["21st"],
    "4": [r"\sqrt{16} = 4", "16^{1/2}", r"\sqrt{16}"],
    "5000": ["5 x 10^3"],
    "0.4": [r"\frac{2}{5}\text{ miles}"],
    "3": [
        r"3\text{ cm}", r"3 \text{ cm}^2", r"3\,\mathrm{m/s}^2", "3 cm", "3cm", "3%", r"3\%",
        r"\$3", r"\$3.00", "3 dollars", "x=3", "x = 3", "3 = x", r"\text{3 apples}",
        r"3\text{ (A)}", "|-3|", "3.", "3.0", "$3$", "**3**", "{3}", "(3)", r"\log_2 8",
        r"\log_2{8}", r"3 \text{ and nothing else}", "3 bolts", r"\text{Area} = 3",
        r"3~\text{cm}", r"\sqrt{9}", r"\{3\}",
    ],
    "-3": [r"-\$3", r"\$-3"],
    "1024": ["2^{10}"],
    "6": ["3!"],
    "0.01": ["10^{-2}"],
    "7/2": [r"3\frac{1}{2}", "3 1/2", "3½", r"3 \frac12", r"\dfrac{7}{2}"],
    "1/2": ["½"],
    "3.5": [r"\tfrac72", r"3\frac12 hours"],
    "1234": ["1,234", "1{,}234", r"1\,234", r"1,\!234"],
    "1234567": ["1,234,567 people"],
    "90": [r"90^\circ", r"90^{\circ}", "90°", r"90\text{ degrees}", "90 degrees"],
    "1500": [r"1.5 \times 10^3", r"1.5\times10^{3}", "1.5e3", r"1.5 \times 10^{3} \text{ m}"],
    "300000000": [r"3 \times 10^8 \text{ m/s}", r"3 \times 10^8 m/s"],
    "1/3": [r"0.\overline{3}"],
    "1/6": [r"0.1\overline{6}"],
    "5000000": ["5 million", r"5\text{ million dollars}", r"\$5 million"],
    "60": ["5 dozen", "60 km/h", "60 miles per hour", r"60\text{ mph}"],
    "12": [
        r"12 \text{ square units}", "12 square feet", r"12\ \text{in}^2", "12 cm^2", "12 cm²",
        r"12\text{ cm}^{3}",
    ],
    "10": ["10 am", r"\binom{5}{2}"],
    "30": [r"\angle ABC = 30^\circ"],
    "3.14": [r"\frac{22}{7} \approx 3.14"],
    "22/7": [r"\frac{22}{7} \approx 3.14"],
    "-5": ["negative 5", "minus 5", "−5", "- 5"],
    "-0.75": [r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}"],
    "0.5": ["50%", ".5", r"\sin \frac{\pi}{6}"],
    "50%": ["50", r"50\%", "50 percent"],
    "50": [r"50\text{ percent}"],
    "0.05": ["$0.05"],
    "1000": ["10^3"],
    "2": [r"\sqrt[3]{8}", "2 hrs"],
    "25": [r"25^\circ\text{C}", "25°C"],
    "100": ["100 cents"],
    "18": ["$18", r"\$18 per day", "18 dollars every day"],
    "70000": [r"\$70,000"],
    "540": ["540 meters"],
    "20": ["20 cups of feed"],
    "64": ["64 dollars"],
    "-1": [r"e^{i\pi}"],
    "1/4": [r"\frac{1}{4} \text{ cup}", r"\frac14 cups"],
    "4/3": [r"1\frac{1}{3}"],
    "0": ["0", "0.00"],
    "120": ["5!"],
    "16": ["(-4)^2"],
    "8": ["2^3"],
}  # fmt: skip

WRONG_NUMBERS = {
    "5": [
        r"5 \text{ or more}", "5 to 1", "5 out of 7", r"\infty", r"\text{half of } 5", "0 + 5",
        r"5\text{-}6", r"5 \implies 6", r"5 \to 6", "5 % 3", "5 mod 3", "5 choose 2",
        "5 factorial", "5 over 6", "5 divided by 2", r"5 \div 2", "5 plus x", "5 times x",
        "5 times ten", "5 times a million", r"5 \text{ times ten}", "5 hundredths", "5 point two",
        "5 and two thirds", "log 5", r"\gcd(5, 10)", r"\lceil 5.2 \rceil", "5 per cent of x",
        r"\frac{5}{}", "f(5)", "P_5", "sqrt 5", "5i", "5j", r"5\theta", r"5 \theta", "5 theta",
        "5!", "5 million", "5k", "5K", "$5M", "5x", "5 x", r"5\sqrt{2}", "5^2", r"5\times 10^3",
        "x^5", "x+5", "5-x", r"\frac{5}{x}", "5, 6", "5 or 6", "5 or six", "not 5", "x > 5",
        r"x \ge 5", r"\pm 5", "±5", "2x = 5", "x^2 = 5", "x+5=5", r"\sqrt{x} = 5", "-5",
        "negative 5", "minus 5", "5.5", r"5\frac{1}{2}", "5½", "5 and a half", "5 halves",
        "(5, 6)", "[5, 6]", r"\{5, 6\}", "(5,6)", "5:6", "5, x", "x=5, y=6",
        r"x=5 \text{ or } x=6", r"\frac{5}{2}", "5/2", "5 squared", r"5\text{ thousand}",
        r"5\text{ million}", "$5$ million", "a5", "R2D5", "5e", "e^5", "5 pi", "5π", "√5", "1/5",
        "0.5", "", "five hundred", "at 5^", r"5 \approx 6", "2+3=6=5", "less than 5", "5+i",
        "3 + 2", r"\overline{5}x", "5y^2", "5ab", r"5 \cdot x", r"\sin 5", r"5 \text{ hundred}",
    ],
    "57": ["57_8"],
    "0": ["0x5"],
    "3": [
        r"\sqrt{3}", "10^{3}", r"3\pi", r"\frac{x}{3}", "3i", "x-3", r"-\$3", "x_3", "3_8", "5-2",
        "square root of 3", r"\text{not } 3", "twice 3", r"\frac{\pi}{3}", r"3\%\cdot x",
        r"\lfloor 3.7 \rfloor x",
    ],
    "10": ["2^{10}", r"\log_{10} 3"],
    "2": [r"\log 2", "2 thirds", r"\frac{5}{2}"],
    "12": ["3*4"],
    "32": ["3²", "3^2"],
    "31": ["3½"],
    "1234": ["(1,234)"],
    "6": [r"5 \approx 6"],
    "14": [r"2 \cdot 7"],
    "0.3": [r"0.\overline{3}"],
    "60": [r"\cos 60^\circ"],
}  # fmt: skip


@each(cases(RIGHT_NUMBERS))
def test_right_numbers(expected, given):
    assert accuracy(Problem("?", {"answer": expected}), rf"So \boxed{{{given}}}.") == 1
    assert accuracy(Problem("?", {"answer": expected}), f"<answer>{given}</answer>") == 1


@each(cases(WRONG_NUMBERS))
def test_wrong_numbers(expected, given):
    assert accuracy(Problem("?", {"answer": expected}), rf"So \boxed{{{given}}}.") == 0
    assert accuracy(Problem("?", {"answer": expected}), f"<answer>{given}</answer>") == 0


# ---- a number is expected, and nothing marks the answer -----------------------------------------

RIGHT_LINES = {
    "1234": ["so 1,000 + 234 makes 1,234 apples"],
    "5": [
        "The answer is 5.", "The answer is $5$.", "So the total is 2 + 3 = 5.", "**5**",
        "**Answer:** 5", "so we get 5, as wanted (see above)",
    ],
    "4": [r"The answer is $\sqrt{16}$."],
    "1/2": [r"The answer is $\frac{1}{2}$.", r"Answer: \frac{1}{2}"],
    "12": ["3 boxes of 4 make 12 apples"],
    "18": [
        "She makes $18 every day.", "She makes 9 * 2 = $18 every day.",
        r"She makes \$18 per day at the farmer's market.",
    ],
    "7": ["$3$ apples and 4 pears make 7."],
    "x^2": ["The answer is $x^2$."],
    "5000000": ["There are 5 million people."],
    "3": [
        "Therefore $x = 3$.", r"Therefore, \(x = 3\).", "so 3 cm", "#### 3", "Final answer: 3 cm",
        r"Hence \(y = 2\) and \(x = 3\).", "= 3",
    ],
    "6": ["It is 6!"],
    "20": ["The profit is 70 - 50 = $20"],
    "50": ["That is 50%.", "That is 50 percent"],
}  # fmt: skip

WRONG_LINES = {
    "3": [
        r"The answer is $\sqrt{3}$.", r"The answer is \sqrt{3}", r"The answer is $3\pi$.",
        "3 boxes of 4 make 12 apples",
    ],
    "12": ["about 12 million"],
    "5": [
          "so it is 5k", "so it is 5x", r"The answer is $\frac{5}{2}$.", "The answer is -5", "",
          "5 is too small", "The answer is 5? No.", "5 是吗？不是", "Is it 5? No, it is not",
    ],
    "10": ["$2^{10}$", "it is 2^{10}"],
    "2": [r"The answer is \frac{5}{2}."],
}  # fmt: skip


@each(cases(RIGHT_LINES))
def test_right_last_lines(expected, given):
    assert accuracy(Problem("?", {"answer": expected}), f"We think.\n{given}\n") == 1


@each(cases(WRONG_LINES))
def test_wrong_last_lines(expected, given):
    assert accuracy(Problem("?", {"answer": expected}), f"We think.\n{given}\n") == 0


# ---- whole answers ------------------------------------------------------------------------------

WHOLE = [
    ("18", r"Janet makes $\boxed{18}$ dollars.", 1), ("18", "#### 18", 1),
    ("18", "#### $18.00", 1), ("18", "#### 18 dollars per day", 1),
    ("18", "<answer>$18</answer>", 1), ("18", "<answer>\n18\n</answer>", 1),
    ("18", r"<answer>The total is $9 \times 2 = 18$ dollars.</answer>", 1),
    ("18", r"\[ \boxed{18} \]", 1), ("18", r"$$\boxed{\$18}$$", 1),
    ("18", r"\boxed{\text{Janet makes \$18 per day}}", 1),
    ("18", r"\boxed{18 \text{ eggs/day}}", 1), ("18", r"\boxed{18\,\text{dollars}}", 1),
    ("18", r"\boxed{18\;\mathrm{m^2}}", 1), ("18", r"\boxed{\mathrm{18\ cm}}", 1),
    ("18", r"\boxed{18\text{ cubic feet}}", 1), ("0.25", r"\boxed{\frac{1}{4}}", 1),
    ("0.25", r"\boxed{25\%}", 1), ("2/3", r"\boxed{\dfrac{2}{3}}", 1),
    ("2/3", r"\boxed{\frac23 \text{ of the cake}}", 1), ("2/3", r"\boxed{0.667}", 0),
    ("2/3", r"\boxed{0.6667}", 0), ("1000", r"\boxed{1,000}", 1), ("1000", r"\boxed{1000.0}", 1),
    ("1000", r"\boxed{1 000}", 1), ("17", r"\boxed{x = 17}", 1), ("17", r"\boxed{x+17}", 0),
    ("17", r"\boxed{17x}", 0), ("17", r"\boxed{17^{\circ}}", 1), ("-17", r"\boxed{-17}", 1),
    ("17", r"\boxed{-17}", 0), ("17", r"\boxed{|{-17}|}", 1),
    ("17", r"\boxed{\left|-17\right|}", 1), ("17", r"\boxed{\lvert -17 \rvert}", 1),
    ("7", "<answer>There are 7 days in a week</answer>", 1),
    ("7", "<answer>**7 days**</answer>", 1), ("7", r"<answer>\boxed{7}</answer>", 1),
    ("7", "<answer>7 apples and 3 pears</answer>", 0),
    ("7", r"<answer>$\boxed{7 \text{ or } 8}$</answer>", 0),
    ("7", "Therefore, the final answer is: $7$.", 1), ("7", "I hope it is correct: 7", 1),
    ("7", r"The final answer is $\frac{14}{2}$", 1),
    ("7", r"the final answer is $\frac{14}{2} = 7$.", 1), ("7", "so 14/2 = 7.", 1),
    ("7", "x = 7 or x = 8", 0), ("7", r"\boxed{7\text{ cm}}, which", 1),
    ("120", r"\boxed{5! = 120}", 1), ("120", r"\boxed{5!=120}", 1),
    ("10", r"\boxed{\binom{5}{3} = 10}", 1), ("3", r"\boxed{\frac{6}{2}=3}", 1),
    ("3", r"\boxed{\frac{6}{2}}", 1), ("15", r"\boxed{15:00}", 0),
    ("15", r"\boxed{15\text{ seconds}}", 1), ("2", r"\boxed{2.}", 1),
    ("2", r"\boxed{2\text{.}}", 1), ("2", r"\boxed{\,2\,}", 1), ("2", r"\boxed{2\;}", 1),
    ("2", r"\boxed{\quad 2}", 1), ("2", r"\boxed{\mathbf{2}}", 1), ("2", r"\boxed{\textbf{2}}", 1),
    ("2", r"\boxed{(2)}", 1), ("2", r"\boxed{\{2\}}", 1), ("2", r"\boxed{[2]}", 1),
    ("2", r"\boxed{\text{(B) }2}", 1), ("2", r"\boxed{\textbf{(B)}\ 2}", 1),
    ("2", r"\boxed{\mathrm{(B)}\ 2}", 1), ("2", r"\boxed{\text{(B)}}", 0),
    ("2", r"\boxed{2 \text{ (B)}}", 1), ("5", r"\boxed{f(x) = 5}", 1),
    ("5", r"\boxed{P = \$5}", 1), ("5", r"\boxed{\text{Cost} = \$5}", 1),
    ("5", r"\boxed{a = 2, b = 3, a + b = 5}", 0), ("5", r"\boxed{m\angle A = 5^\circ}", 1),
    ("5", r"\boxed{\triangle ABC = 5}", 1), ("5", r"\boxed{\overline{AB} = 5\text{ cm}}", 1),
    ("5", r"\boxed{\sin A = 5}", 1), ("5", r"\boxed{a_1 = 5}", 1), ("5", r"\boxed{a_{n} = 5}", 1),
    ("5", r"\boxed{3x = 5}", 0), ("5", r"\boxed{x/2 = 5}", 0), ("5", r"\boxed{x - 5 = 0}", 0),
    ("0", r"\boxed{x - 5 = 0}", 0), ("0", r"\boxed{x^2-1=0}", 0), ("0", r"\boxed{2x=0}", 0),
    ("5", r"\boxed{5 = 5}", 1), ("5", r"\boxed{6 = 5}", 0), ("5", r"\boxed{x=6=5}", 0),
]  # fmt: skip

STYLED = [
    ("2", r"\bf 2", 1), ("2", r"{\bf 2}", 1), ("2", r"\bf{2}", 1), ("2", r"\mathbf 2", 1),
    ("2", r"\boldsymbol{2}", 1), ("2", r"\textcolor{red}{2}", 1), ("2", r"\color{red} 2", 1),
    ("2", r"{\color{red} 2}", 1), ("2", r"\color[rgb]{1,0,0}{2}", 1), ("2", r"{\large\bf 2}", 1),
    ("2", r"\boxed{\boxed{2}}", 1), ("2", r"\textcolor{red}{\mathbf{2}}", 1),
    ("2", r"2\ {\rm cm}", 1), ("2", r"2 \rm{cm}", 1), ("2", r"2\ \mathbf{kg}", 1),
    ("2", r"\textcolor{red}{x=2}", 1), ("2", r"2\hspace{1cm}", 1), ("2", "2\u200b", 1),
    ("2", r"2\frac{\text{m}}{\text{s}}", 1), ("23", r"2\textcolor{red}{3}", 1),
    ("4", r"\mathbf{2}^2", 1), ("4", r"\text{2}^2", 1), ("2", r"4/\text{2}", 1),
    ("0.75", r"\nicefrac{3}{4}", 1), ("300000", r"3.0 \ast 10^5", 1),
    ("2", r"\mathbf{2}^2", 0), ("2", r"\text{2}^2", 0), ("2", r"\bf 23", 0), ("2", r"{\bf 2}3", 0),
    ("2", r"\color{2} 3", 0), ("2", r"\textcolor{red}{2}5", 0), ("2", r"-\textcolor{red}{2}", 0),
    ("2", r"\textcolor{red}{-}2", 0), ("2", r"2\textcolor{red}{^2}", 0), ("2", r"2\mathbf{i}", 0),
    ("2", r"2\mathrm{i}", 0), ("2", r"2\mathrm{e}^2", 0), ("2", r"\mathbf{x}2", 0),
    ("2", r"2\textcolor{red}{xy}", 0), ("2", r"2\textcolor{red}{(x)}", 0), ("2", r"\cancel{2}", 0),
    ("2", r"2\boldsymbol{\pi}", 0), ("2", r"2\mathbf{million}", 0), ("2", r"{\rm not } 2", 0),
    ("2", r"\textcolor{red}{half of} 2", 0), ("2", r"2\mathbf{or}3", 0), ("2", r"\sqrt{\bf 2}", 0),
    ("2", r"2\frac{\text{3}}{\text{4}}", 0), ("56", r"5\hspace{1cm}6", 0),
    ("10", r"2\textcolor{red}{5}", 0), ("5", r"5\textcolor{red}{,}6", 0), ("5", r"5\Big/2", 0),
    (r"\frac43", r"\frac{\bf 12}{3}", 0), (r"10\pi", r"2{\bf 5}\pi", 0),
    (r"10\pi", r"{\bf 2}{\bf 5}\pi", 0), (r"10\pi", r"\mathbf{2}\textcolor{red}{5}\pi", 0),
    (r"25\pi", r"2{\bf 5}\pi", 1), ("2.5", r"2\mathbf{.5}", 1), ("1", r"2\mathbf{.5}", 0),
    (r"\frac12", r"\mathbf{\frac{1}{2}}", 1), (r"\frac12", r"\frac{\mathbf{1}}{2}", 1),
    ("x^2+1", r"\textcolor{blue}{x^2}+1", 1), ("x^2+1", r"{\bf x}^2+1", 1),
    ("x^2+1", r"\textcolor{blue}{x^2}-1", 0), (r"\sin x", r"\sin\mathbf{x}", 1),
    (r"2\mathbf{i}+3\mathbf{j}", r"3\mathbf{j}+2\mathbf{i}", 1),
    (r"2\mathbf{i}+3\mathbf{j}", "5", 0), (r"\text{Monday}", r"{\bf Monday}", 1),
    (r"\text{Monday}", r"\textcolor{red}{Monday}", 1), (r"\text{Monday}", "monday", 1),
    (r"\text{Yes}", "yes", 1), (r"\text{Monday}", r"\bf Tuesday", 0), ("ab", "Ab", 0),
    ("ABC", "abc", 0), ("A", r"{\bf (A)}", 1), ("A", r"\textcolor{red}{A}", 1), ("A", r"\bf B", 0),
]  # fmt: skip
"""Fonts, colours and frames change nothing; what they are put on does."""


@each(STYLED)
def test_style_changes_nothing(expected, given, value):
    assert accuracy(Problem("?", {"answer": expected}), rf"So \boxed{{{given}}}.") == value


@each([r"\textcolor{red}{B}", r"{\bf (B)}", r"\boxed{\mathbf{B}}", r"\bf B"])
def test_a_choice_in_any_style(given):
    for expected in "AB":
        record = Problem("?", {"answer": expected}, "choice")
        assert accuracy(record, rf"So \boxed{{{given}}}.") == (expected == "B")


@each(WHOLE)
def test_whole_answers(expected, text, value):
    assert accuracy(Problem("?", {"answer": expected}), text) == value


# ---- mathematics is expected --------------------------------------------------------------------

SAME_MATHS = {
    "x^2": ["$x^2$."],
    r"\mathbb{R}": [r"x\in\mathbb{R}"],
    "(x-1)^2+(y-2)^2=9": ["x^2-2x+y^2-4y=4"],
    "y=-2x+3": ["2x+y=3"],
    "B": ["The answer is (B)"],
    r"\frac{1}{2},\frac{1}{3}": [r"\frac13, \frac12"],
    r"\left(3,\frac{\pi}{2}\right)": [r"(3, \pi/2)"],
    r"\frac{x+2}{7}": [r"\frac{1}{7}x+\frac{2}{7}"],
    r"\sqrt{51}": [r"\sqrt{51}"],
    "9": [r"9\text{ units}"],
    r"\cot x": [r"\cot x"],
    r"\frac{9\sqrt{3}}{4}\pi": [r"\frac{9\pi\sqrt3}{4}"],
    "6 - 5i": ["6-5i"],
    "-2,1": ["1,-2"],
    r"15\mbox{ cm}^2": ["15"],
    "x^3+3x-6": ["3x + x^3 - 6"],
    r"\frac{270}7\text{ degrees}": [r"\frac{270}{7}"],
    r"70 \sqrt{2}": [r"70\sqrt{2}"],
    ".0000672": [r"6.72\times10^{-5}"],
    r"11\sqrt2": [r"11\sqrt{2}"],
    "C": [r"\text{C}"],
    "(6,31,-1)": ["(6,31,-1)"],
    r"\frac{3}{2}, -1": [r"x = -1, \frac32"],
    r"10\%": [r"10\%"],
    r"\frac{\sqrt{3}}{3}": [r"\frac{1}{\sqrt{3}}"],
    "x^2+2x+1": ["(x+1)^2"],
    "1,2": [
        "2,1", r"\{1,2\}", r"x=1 \text{ or } x=2", "x = 1, 2", "x=1, x=2", "1 and 2",
        r"1\text{ and }2",
    ],
    r"(-\infty,2)\cup(3,\infty)": [
        r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)",
        r"x\in(-\infty,2)\cup(3,\infty)",
    ],
    r"1\pm\sqrt{2}": [r"1+\sqrt2, 1-\sqrt2", r"1 \pm \sqrt{2}"],
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"],
    r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}": [r"\begin{bmatrix} \frac12 \\ 2 \end{bmatrix}"],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [r"\begin{pmatrix} 1 \\ \ 2 \end{pmatrix}"],
    "2516_8": ["2516_{8}"],
    r"\text{(A)}": ["A"],
    r"\text{A}": ["(A)"],
    "A": [r"\textbf{(A)}"],
    r"\text{east}": ["east"],
    r"\text{Evelyn}": [r"\text{Evelyn}"],
    "y=2x+1": ["y = 1+2x"],
    "2x+y=3": ["y+2x=3"],
    "2x+y-3=0": ["2x+y=3"],
    "x^2+1": ["The answer is $x^2+1$.", "f(x) = x^2 + 1"],
    "[0,1]": [r"x \in [0,1]", r"\left[0,1\right]"],
    r"\left(\frac{1}{2}, 3\right)": ["(0.5,3)"],
    "3+4i": ["4i+3"],
    r"2\pi": [r"2\pi \text{ cm}"],
    r"36\pi": [r"36\pi \text{ square units}"],
    r"\frac{\pi}{2}": [r"\pi/2"],
    r"\dfrac{x}{2}": [r"\frac12 x"],
    r"x \ge 2": [r"x \geq 2"],
    r"x\le2": ["x ≤ 2"],
    r"\emptyset": [r"\varnothing"],
    "5": ["5"],
    r"6\text{ cm}": ["6"],
    r"5\sqrt{2}": [r"5\sqrt2\text{ units}"],
    r"\frac{3}{4}\text{ inches}": ["0.75"],
    r"3\text{ cm}^2": ["3"],
    "x=5": ["5"],
    "n!": ["n!"],
    r"\binom{n}{2}": [r"\frac{n(n-1)}{2}"],
    "e^{2x}": ["e^{2 x}"],
    r"-\frac{1}{2}": [r"\frac{-1}{2}"],
    "(1,-2)": ["(1, -2)"],
    r"\{x, y\}": [r"\{y,x\}"],
    "x=1,y=2": ["y=2, x=1"],
    "10:30": ["10:30"],
    r"\ln 2": [r"\log 2"],
    "11/2": ["5.5"],
    r"\sqrt{2}": [r"x=\sqrt{2}"],
    "2k+1": ["1+2k"],
    "x^{2}": ["x²"],
    "12,3": ["3, 12"],
    "-1, 1": [r"\pm 1"],
    r"(2,\infty)": [r"(2, +\infty)"],
    "(x-1)(x+2)": ["(x+2)(x-1)"],
    r"\text{Yes}": ["Yes"],
    "m^2+1": ["1+m^2"],
    "3a": ["3a"],
    "x>5": ["5<x", r"x \gt 5", r"5 \lt x", r"x>\frac{10}{2}", "$x > 5.0$"],
    r"x \le 5": [r"5 \ge x", "x<=5", "5 >= x", "x ≤ 5", r"x\leqslant 5"],
    "2<x<5": ["5>x>2"],
    r"a<b\le c": [r"c \geq b > a"],
    r"x^2+y^2\le 4": [r"4\ge y^2+x^2"],
    r"x<1\text{ or }x>2": [r"2<x \text{ or } 1>x", "x<1, x>2"],
    r"x \ne 3": [r"x\neq 3", r"3 \ne x", "x ≠ 3"],
    r"30^\circ": ["30", r"30\text{ degrees}", "30°", r"\angle A = 30^{\circ}"],
    r"\frac{\pi}{6}": [r"\frac{\pi}{6}\text{ radians}", r"\pi/6\text{ rad}"],
    r"\frac{180}{\pi}^\circ": [r"\frac{180}{\pi}"],
    "(1,2)": ["(x,y)=(1,2)", r"(x, y) = \left(1, 2\right)", r"\bigl(1,2\bigr)"],
    "(1,2),(3,4)": [r"(x,y)=(3,4) \text{ or } (x,y)=(1,2)"],
    r"\begin{pmatrix} 1 & 2 \\ 5 & 4 \end{pmatrix}": [
        r"\begin{pmatrix}1&2\\[6pt]5&4\end{pmatrix}", r"A=\begin{pmatrix}1&2\\5&4\end{pmatrix}",
        r"\mathbf{\begin{pmatrix}1&2\\5&4\end{pmatrix}}",
    ],
    r"\{3,4\}": ["{4,3}"],
    "5 cm": ["5", "5 centimeters", r"5\text{ cm}", "5厘米", "5 widgets"],
    r"5\text{ cm}^2": ["5 square centimeters", "5cm²", "5", "5 平方厘米"],
    "60 km/h": ["60", r"60\text{ km/h}", "60 kilometers per hour"],
    "3 minutes": ["3 min", "3 分钟"],
}  # fmt: skip

OTHER_MATHS = {
    "1,2": ["(1,2)", "1,3", "1", "(x,y)=(1,2)"],
    "(1,2)": ["(2,1)", "1,2", "(y,x)=(1,2)", "(x,y)=(2,1)", r"(x,y)\ne(1,2)", "{1,2}"],
    "11/2": ["1 1/2"],
    "34": ["3 4"],
    "m^2+1": ["m+1"],
    "x^2": ["2x", "x^2+1"],
    "x=1,y=2": ["x=2,y=1"],
    r"(0,1)\cup(2,3)": ["(0,1)", r"(0,1)\cup(2,4)"],
    r"1\pm\sqrt2": [r"1+\sqrt2"],
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [r"\begin{pmatrix} 1 & 2 \end{pmatrix}"],
    r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}": [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"],
    "9": [r"3\text{ cm}^2"],
    "x": ["y", "x, y"],
    "2x+y=3": ["2x+y=4"],
    r"\text{A}": [r"\text{B}"],
    "2516_8": ["2516"],
    "[0,1]": ["(0,1)"],
    r"x \ge 2": ["x > 2"],
    "5m": ["5"],
    "5x": ["5"],
    "no": ["on"],
    r"\text{east}": [r"\text{west}"],
    "3i": ["3"],
    r"2\pi": ["2"],
    "n!": ["n"],
    "x<5": ["x>5", "5<x", r"x \le 5", "x=5", "5", "y<5", "x<-5", "-5<x", "x<50", "x<5<6", "x=<5"],
    "x>5": [r"x \ge 5", "5 -> x", "x>4, x>5", r"x>5\text{ or }x<0", r"x>5\text{ million}"],
    "2<x<5": ["5<x<2", r"2\le x<5", "2<x", "2<y<5", "2<5<x", "2,5"],
    r"a<b\le c": ["a<b<c", r"a\le b<c", r"a<c\le b", r"c \ge a > b"],
    r"x<1\text{ or }x>2": [
        r"x<1\text{ and }x>2", r"x<1 \wedge x>2", r"x>1\text{ or }x<2", "1<x<2", "x<1",
    ],
    r"x \ne 3": ["x=3", r"x\ne 4", r"y\ne 3", "3", "x<3"],
    r"30^\circ": [
        r"\frac{\pi}{6}", r"30\text{ radians}", r"30\,\mathrm{rad}", r"31^\circ", r"30^\circ x",
        r"\sin 30^\circ", r"-30^\circ", r"330^\circ",
    ],
    r"\frac{\pi}{6}": [r"30^\circ", "30", r"\frac{\pi}{6}^\circ", r"\frac{\pi}{6}\text{ degrees}"],
    r"\begin{pmatrix} 1 & 2 \\ 5 & 4 \end{pmatrix}": [r"\begin{pmatrix}1&2\\[6pt]4&5\end{pmatrix}"],
    r"\sqrt{5}": ["5"],
    r"36\pi": ["36"],
    "3+4i": ["7"],
    "5!": ["5"],
    "2^{10}": ["10"],
    "5 cm": ["5 m", "50", "5 cm^2", "5 厘米 或 6 厘米"],
    r"5\text{ cm}^2": ["5 cm", r"5\text{ m}^2", "5 cubic centimeters"],
    "60 km/h": ["60 km", "60 m/s", "60 miles per hour"],
    "3 minutes": ["3 hours", "3 小时", "180"],
    "5 厘米": ["5 米", "5 m"],
    r"\frac{1}{2}\text{ hour}": [r"\frac{1}{2} minute"],
}  # fmt: skip


@each(cases(SAME_MATHS))
def test_same_mathematics(expected, given):
    assert same_maths(expected, given)


@each(cases(OTHER_MATHS))
def test_other_mathematics(expected, given):
    assert not same_maths(expected, given)


def test_matrices_that_differ_in_spacing_alone_are_equal():
    r"""`\\ ` ends a row; its second backslash begins no space."""
    wide, close = (r"\begin{foo} 1 & 2 \\ 3 & 4 \end{foo}", r"\begin{foo}1&2\\3&4\end{foo}")
    assert same_maths(wide, close)
    assert same_maths(wide.replace("foo", "pmatrix"), close.replace("foo", "pmatrix"))
    assert not same_maths(wide, close.replace("3", "5"))


# ---- the rest -----------------------------------------------------------------------------------


def test_tolerance_reaches_values_of_expressions():
    assert same_number("1.414", r"\sqrt{2}", tolerance=0.001)
    assert not same_number("1.414", r"\sqrt{2}", tolerance=0.0001)
    assert not same_number("2", r"\sqrt{2}", tolerance=0.1)
    assert same_number("6.28", r"2\pi \text{ cm}", tolerance=0.01)


def test_degrees_and_radians_are_two_numbers():
    for expected, given in ((r"30^\circ", r"30\text{ rad}"), ("30 radians", "30°")):
        assert not same_maths(expected, given)
        assert same_number("30", given)


def test_huge_expressions_are_wrong_at_once():
    for text in (
        r"\sqrt{9^{9^9}}",
        "99999!",
        "9^{9^{9^9}}",
        r"\sqrt{" * 30 + "1" + "}" * 30 + "0!",
    ):
        assert not same_number("5", text)


@each([
    (r"so 5\text{ cm}^2", ("5", 1)), ("5 cm", ("5", 1)), ("5 dollars", ("5", 1)),
    ("5 million people", ("5", 10**6)), ("3i", ("3i", 1)), ("x-3", ("x-3", 1)),
    ("5k", ("5k", 1)), ("5 or 6", ("5 or 6", 1)), ("not 5", ("not 5", 1)),
    ("5 apples!", ("5", 1)), ("5! ways", ("5!", 1)), ("", ("", 1)), ("apples", ("apples", 1)),
])  # fmt: skip
def test_what_may_stand_around_a_number(text, left):
    assert core(plain(text)) == left
