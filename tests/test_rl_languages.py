r"""Which answers are right in any language and notation: units, announcements, denials, lists.

In every table: the expected answer, and what a model wrote for it. `tests/test_rl_equivalence.py`
has the tables of English answers in the styles of GSM8K and MATH.
"""

from rl.problems import Problem
from rl.verdict.rules import accuracy
from rl.verdict.worded_answers import same_choice, same_text
from tests.tables import each


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(expected, given) for expected, answers in table.items() for given in answers]


# ---- in a box -----------------------------------------------------------------------------------

RIGHT_BOXES = {
    "5": [
        r"5\text{个}", "5元", "5 см", "5 μm", "5µm", "５", "５。", "5个苹果", "共有5个", "5 个", r"5\text{ 厘米}",
        r"5\,\text{см}", "5 кг", "5 рублей", "5 руб.", "5 élèves", "5 euros", "5円", "5人", r"5\text{개}",
        "5 km/h", "5 км/ч", r"5\text{ м/с}", r"5\text{ м}^2", "5平方米", "5平方厘米", "5㎡", "5米/秒", "5℃",
        r"5\ \mu\text{m}", r"5\,\Omega", "￥5", "5₽", "₽5", "答案是5", "答案：5", "最终答案是5", "Ответ: 5",
        "La réponse est 5", "答えは5です", "정답은 5", "AB等于5", "面积为5", "半径是5", r"\text{答案是 }5", "x = 5元",
        "Die Antwort ist 5", "La respuesta es 5", "5 Äpfel", "一共有5个苹果", "三角形的面积是5", "5倍", "5°",
        r"\text{共有 5 个}", "5 шт.", "равно 5", "5 кв. м", "5 sec", "5 secs", "5度", r"5\text{度}", "5 градусов",
        r"\text{5 см}", "5天", "5小时", "5歳", "5個", "第5天", "5．", "5.0 см", "5 см²", "（5）",
        "5 г", "5 ч", "5 м³", r"5~\text{см}", "5个苹果和橙子", "因此x=5", "所以x=5", "5 m²",
        r"\text{5个苹果}", "5,0", "S=5平方单位", "5 Mètres", "5 mètres carrés", r"\yen 5",
    ],
    "-5": ["负5", "минус 5", "moins 5", "マイナス5", "menos 5", "-5 °C", "-5℃", "-5元"],
    "50000": ["5万", "5万元", r"5\text{万}", "50 000 руб.".replace(" 000", "\u00a0000"), "50 тысяч", "50 тыс. руб.",
              "50 mille", "50 tausend", "5만 원", "5×10⁴", r"5\times10^{4}", "50千", "50,000元"],
    "1500000": ["1.5百万", "150万", "1,5 млн", "1,5 Millionen", "1,5 million d'euros", "1.5 million"],
    "300000000": ["3亿", "3億円"],
    "5000": ["5千", "5000千克"],
    "0.5": ["百分之50", "50%", "50％", "50 процентов", "50 pour cent", "50 Prozent", "2分之1", "1/2", "0,5",
            "0{,}5", r"\frac12", "2分の1"],
    "3.5": ["3又1/2", r"3又\frac12", "3,5", "3,5 см", r"3{,}5", "3又2分之1", r"3\frac{1}{2}元", "3.5元", "３．５"],
    "3.14": ["3,14", "3{,}14", "x = 3,14", r"x \approx 3{,}14", "3,14 см"],
    "14916": [r"14{,}916", r"14\,916", "14\u2009916", "14\u202f916", "14,916", r"14,\!916", r"14,\! 916", r"14\ 916",
              "14'916", "14,916元", "14 916".replace(" ", "\u00a0"), r"14{,}916\text{ см}"],
    "1234567.5": ["1.234.567,5", "1,234,567.5", "1 234 567,5".replace(" ", "\u202f")],
    r"32,\! 349": ["32349", "32,349", r"32{,}349", r"32\,349"],
    "1000": ["10^{3}", "10³", "1,000", "1e3", r"1{,}000", "10^3元"],
    "1/2": [r"\dfrac12", r"\frac12", "½", "1/2 см", r"\frac{1}{2}\text{小时}"],
    "30": ["30度", "30°", r"30^\circ", "30 градусов", "30 degrés"],
    "no": ["No", "NO", "no.", "No.", r"\text{No}"],
    "No": ["no", r"\text{no}", "NO", "否", "нет", "non"],
    "NO": ["no", "No"],
    "Yes": ["yes", "YES", "是", "да", "oui", "はい"],
    "True": ["true", r"\text{true}"],
    "是": ["是", "是。", "Yes", r"\text{是}"],
    "星期一": [r"\text{星期一}", "星期一。"],
    "Москва": ["москва", r"\text{Москва}", "Москва."],
    "3月5日": ["3月5日", "3月5日。"],
    "5个": ["5", "5个", r"5\text{个}"],
    r"5\text{ 厘米}": ["5", "5 厘米"],
    r"\sec^2 x": [r"\sec^2(x)", r"\frac{1}{\cos^2 x}", r"1+\tan^2 x", r"\sec^{2}x"],
    r"\cot x": [r"\frac{\cos x}{\sin x}", r"\cot(x)", r"\operatorname{ctg} x", r"\frac{1}{\tan x}"],
    r"\csc x": [r"\frac{1}{\sin x}"],
    r"\sinh x": [r"\frac{e^x-e^{-x}}{2}"],
    r"\lg 2": [r"\log_{10} 2", r"\lg(2)"],
    r"(1,\infty)": ["x > 1", "x>1", r"1 < x", r"x \in (1, +\infty)", "(1,∞)", "(1; +∞)", r"]1;+\infty[", "x＞1",
                    r"\{x > 1\}".replace(r"\{", "").replace(r"\}", ""), r"t > 1"],
    "x > 1": [r"(1,\infty)", r"x\in(1,+\infty)", "x>1。"],
    r"(-\infty, 2]": [r"x \le 2", "x ≤ 2", "x<=2", r"x\leqslant 2", r"2 \geq x"],
    "[1,3)": [r"1 \le x < 3", r"3 > x \geq 1", "[1;3)", "[1;3["],
    r"(-\infty,1)\cup(2,\infty)": [
        r"x<1 \text{ or } x>2", "x<1或x>2", "x<1 или x>2", "x<1 ou x>2", r"x>2 \text{ or } x<1",
        r"(-∞;1)∪(2;+∞)", r"]-\infty;1[\cup]2;+\infty[",
    ],
    r"x<1\text{ or }x>2": [r"(-\infty,1)\cup(2,\infty)", "x<1或x>2", r"x<1 \lor x>2"],
    r"(-\infty,3)\cup(3,\infty)": [r"x \ne 3", "x≠3"],
    "x + y = 1": ["2x + 2y = 2", "2x+2y-2=0", r"\frac{x}{2}+\frac{y}{2}=\frac12", "x=1-y", "-x-y=-1", "x+y=1。"],
    "y = 2x + 1": ["2x - y + 1 = 0", "y-2x=1", "6x-3y+3=0"],
    r"x \neq 5": ["x != 5", "x!=5", r"x \not= 5", "x ≠ 5"],
    "x != 5": [r"x \ne 5", "x != 5"],
    "-12;-11;-10": ["-12, -11, -10", "-10; -11; -12", r"\{-12,-11,-10\}", "-12、-11、-10", "x=-12,-11,-10"],
    "1, 2": ["1; 2", "1 и 2", "1 et 2", "1和2", "1、2", "x=1或x=2", "x=1 или x=2", "x_1=1, x_2=2", "x_1 = 2, x_2 = 1",
             r"x_{1}=1 \text{ and } x_{2}=2", r"\{1;2\}", "1，2", "x=1，x=2", "x = 1 oder x = 2", "a=1, b=2"],
    "x_1 = 1, x_2 = 2": ["x_{1}=1, x_{2}=2", "x_2=2, x_1=1", "x=1, x=2", "x=2 or x=1", "1, 2"],
    "AB=4, CD=5": ["AB = 4, CD = 5", "CD=5, AB=4", "4, 5", "AB=4，CD=5", r"AB=4\text{ and }CD=5", "AB=4; CD=5"],
    "x=1, y=2": ["(1,2)", "y=2, x=1", "1, 2", "x=1, y=2", "(x,y)=(1,2)"],
    "(1,2)": ["x=1, y=2", "(1;2)", "（1，2）", "y=2,x=1"],
    "1.5; 2.5": ["1,5; 2,5", "2,5; 1,5"],
    "a:b=7:32": ["7:32", "a:b = 7:32", "7：32", "a : b = 7 : 32"],
    "7:32": ["a:b=7:32", "7 : 32", "7∶32"],
    "3:4:5": ["a:b:c=3:4:5"],
    r"5\sqrt{2}": [r"5\sqrt2\text{ 厘米}", r"5\sqrt2厘米", r"5\sqrt{2}\text{ см}", r"x=5\sqrt{2}米", r"5\sqrt2 см"],
    r"36\pi": [r"36π平方厘米", r"36\pi\text{ см}^2", "36π см²", "36π"],
    "x^2": ["答案是x^2", "Ответ: x^2", "所以f(x)=x^2", "La réponse est $x^2$"],
    r"\frac{\pi}{6}": [r"\frac{\pi}{6}\text{ 弧度}", "π/6"],
    r"2^{10}": ["1024"],
}  # fmt: skip

WRONG_BOXES = {
    "5": [
        "不是5", "答案不是5", "5或6", "5万", "5千", "5亿", "5半", "5个半", "半个5", "5分之1", "负5", "根号5",
        "5的平方", "5平方", "大于5", "小于5", "至少5", "至多5", "5以上", "5以下", "超过5", "5多个", "5点5", "5点五", "5又1/2", "5又二分之一",
        "5成", "5折", "十5", "5十", "不等于5", "3和5", "3到5", "3、5", "5、6", "3，5", "x不是5", "5乘以2", "x的平方是5",
        "не 5", "5 или 6", "3 или 5", "минус 5", "5 тысяч", "5 млн", "5 миллионов", "половина от 5", "корень из 5",
        "5 в квадрате", "больше 5", "не менее 5", "от 3 до 5", "5 с половиной", "3 и 5", "5 десятых", "5х", "5 целых",
        "pas 5", "n'est pas 5", "5 ou 6", "3 ou 5", "moins 5", "5 mille", "5 millions", "5 et demi", "la moitié de 5",
        "racine de 5", "au moins 5", "plus de 5", "3 et 5", "5 au carré", "5 virgule 2", "5 tiers", "5 milliards",
        "nicht 5", "5 oder 6", "minus 5", "5 Millionen", "5 tausend", "halb 5", "mindestens 5", "Wurzel aus 5", "kein 5",
        "no es 5", "menos 5", "5 mil", "5 millones", "raíz de 5", "5 y medio", "não 5", "meno 5",
        "5ではない", "5または6", "5以上", "5未満", "マイナス5", "5分の1", "5の2乗", "3か5", "5割", "5でない", "5ではありません",
        "5가 아니다", "5 또는 6", "5만", "5 이상", "5개 반", "5의 제곱", "3이나 5",
        "5,5", "5,6", "5{,}6", "0,5", "5;6", "5; 6", r"5\text{ or }6", r"\text{not }5", "5 to 6", "3~5",
        r"5\text{万}", r"5\text{ млн}", r"5\text{ 或 }6", r"\text{不是}5", r"\text{не }5", r"5\text{ 以上}", r"\text{大于}5",
        "5 and 6", "5 secx", r"5\sec x", "at least 5", "at most 5", "nearly 5", "point 5", "forty 5",
        "AB=4, CD=5", "x_1=4, x_2=5", "7:5", "a:b=5", "5:5", "5 μ", "μ5", "x大于5", "5＜6", "可能是5或6",
    ],
    "125": ["0,125", "0{,}125", r"0\,125"],
    "916": [r"14{,}916", r"14\,916", "14\u2009916", r"14,\!916", r"14,\! 916"],
    "14": [r"14{,}916", "14,916", "3,14", "3{,}14"],
    "1.234": ["1,234", r"1{,}234"],
    "1234": ["1.234", "(1,234)", "1, 234", "1;234"],
    "314": ["3,14", "3{,}14"],
    "0.05": ["5"],
    "25": [r"5\text{ м}^2", "5 см²", "5米^2", r"5^{2}\text{个}x"],
    "7/2": ["3和1/2", "3, 1/2"],
    "1": ["1/二", "1分之2"],
    "no": ["on", "yes", "нет или да", "not", "是", "none"],
    "No": ["Yes", "是", "да", "N", "O"],
    "Yes": ["No", "否", "不是", "не да", "yes or no", "是或否"],
    "是": ["否", "不是", "是不是", "No"],
    "星期一": ["星期二", "星期", "一", "星期一或星期二", "不是星期一"],
    "Москва": ["Минск", "не Москва", "Москва или Минск"],
    "3月5日": ["3月6日", "3年5日", "5月3日", "3, 5", "35"],
    r"3\text{ hours }5\text{ minutes}": [r"3\text{ minutes }5\text{ hours}", "35", "3, 5"],
    "2小时30分": ["2分30小时", "230", "2, 30"],
    r"\sec^2 x": [r"\cos^2 x", r"\sec x", r"\csc^2 x", r"\sec 2x", r"\sec^2 y"],
    r"\cot x": [r"\tan x", r"\frac{\sin x}{\cos x}", r"\operatorname{arctan} x"],
    r"\lg 2": [r"\ln 2", r"\log_2 10"],
    r"(1,\infty)": [
        r"x \ge 1", "x < 1", "x > 2", r"[1,\infty)", r"(1, 100)", "x=1", r"(-\infty,1)", "x>-1", r"x \ne 1",
        "x>1或x<0", r"x>1 \text{ and } x<5", "不是x>1", r"y \in (2,\infty)",
    ],
    "x > 1": [r"[1,\infty)", r"(-\infty,1)", r"y\in(1,\infty)", r"(1,2)", "y>1"],
    "[1,3)": [r"1<x<3", r"1\le x\le 3", "(1,3)", "]1;3[", "]1;3]", r"1 \le x < 4"],
    r"(-\infty,1)\cup(2,\infty)": [
        r"x<1 \text{ and } x>2", "x<1且x>2", "1<x<2", "x<1", "x<1 и x>2", r"x<1 \text{ or } x \ge 2", "x<1或y>2",
    ],
    r"(-\infty,3)\cup(3,\infty)": ["x=3", r"x \ne 2", r"(-\infty,\infty)"],
    "x + y = 1": ["2x + 2y = 1", "0=0", "x+y=2", "x-y=1", "x(x+y)=x", "x + y = 0", "2x+y=1", "0x+0y=0", "x+y", "x+z=1"],
    "x = 5": ["2x = 10", "3x = 5", "x+1=6", "0=0"],
    r"x \neq 5": ["x = 5", "x != 6", "y != 5", "5"],
    "x = 120": ["x != 120"],
    "-12;-11;-10": ["-12, -11", "-12, -11, 10", "(-12,-11,-10)x", "-12;-11;-10;-9", "-12"],
    "1, 2": ["1 или 3", "(1,2)", "1,2,3", "1.2", "1", "x=1或x=3", "x_1=1, x_2=3", "2", "1:2", "12", "不是1和2", "a=2, b=1"],
    "x_1 = 1, x_2 = 2": ["x_1=2, x_2=1", "x_1=1", "x=1", "2, 1", "y_1=1, y_2=2", "x_1=1, x_3=2"],
    "AB=4, CD=5": ["AB=5, CD=4", "5, 4", "AB=4", "AB=4, CE=5", "4", "45", "(5,4)"],
    "x=1, y=2": ["(2,1)", "x=2, y=1", "2, 1", "x=1, z=2", "(y,x)=(1,2)"],
    "(1,2)": ["y=1, x=2", "(2;1)", "[1,2]", "1, 2", "x=1", "1<x<3", "x=2, y=1"],
    "1.5; 2.5": ["1,5", "1; 5; 2; 5", "15; 25"],
    "a:b=7:32": ["32:7", "b:a=7:32", "7:33", "7", "7:32:1", "7,32", "39"],
    "7:32": ["7", "32", "a:b=32:7", "7, 32"],
    r"5\sqrt{2}": [r"5\sqrt2万", r"负5\sqrt2", r"不是5\sqrt2", r"\text{not }5\sqrt2", r"5\sqrt2或3", r"-5\sqrt{2}\text{ см}", r"5\sqrt3 см"],
    "x^2": ["不是x^2", "не x^2", "x^2或x", r"\text{not }x^2", "x^2 или x", "x"],
    r"\frac{\pi}{6}": [r"30度", "30°", "30 градусов", r"\frac{\pi}{6}\text{ 度}"],
    r"30^\circ": [r"30\text{ 弧度}", "30 радиан", r"\frac{\pi}{6}"],
    r"\{1,2\}": ["{1}", "{1,2,3}", "{1;3}"],
}  # fmt: skip


@each(cases(RIGHT_BOXES))
def test_right_boxes(expected, given):
    assert accuracy(Problem("?", {"answer": expected}), rf"So \boxed{{{given}}}.") == 1
    assert accuracy(Problem("?", {"answer": expected}), f"<answer>{given}</answer>") == 1


@each(cases(WRONG_BOXES))
def test_wrong_boxes(expected, given):
    assert accuracy(Problem("?", {"answer": expected}), rf"So \boxed{{{given}}}.") == 0
    assert accuracy(Problem("?", {"answer": expected}), f"<answer>{given}</answer>") == 0


# ---- whole answers ------------------------------------------------------------------------------

RIGHT_TEXTS = {
    "5": [
        "答案是5", "共有5个苹果", "所以答案是5。", "最终答案：5", "小明有3个，小红有2个，一共5个。", "因此，最终答案为 5 元。",
        "Ответ: 5.", "Таким образом, всего 5 яблок.", "La réponse est 5.", "Donc il y a 5 pommes.", "答えは5です。",
        "답은 5입니다.", "Die Antwort ist 5.", "La respuesta es 5.", "答案是$5$。", "答案是\\(5\\)。", "答案为５。",
        "The answer is 5.<|im_end|>\n<|im_start|>user", "The answer is 5.<｜end▁of▁sentence｜>", "The answer is 5</s>",
        "The answer is 5.<|eot_id|>", r"答案是 $\boxed{5}$。", r"\boxed{5}<|im_end|>\n\boxed{6}", r"最终答案：\boxed{5元}",
        r"\boxed{5}, not 6", r"First \boxed{3}. Then \boxed{5}.", r"\boxed{5} and again \boxed{5}", r"$$\boxed{5}$$ so \boxed{5}",
        r"So 4 is not allowed, the answer is \boxed{5}.", r"Это не 4, поэтому \boxed{5}", "**答案：5**", "#### 5元", "#### 5 см",
        "Since 4 does not work, the answer is 5.", "不是4，而答案是5。", "Итого 5 руб.", "The answer is 5 cm.",
        "合计：3+2=5（元）", "故共有5种。", "x=5", "综上，x=5。", "So there are 5 of them.", "Answer: 5",
    ],
    "14916": ["The final answer is $14{,}916$. I hope it is correct.", "It is 14,916.", "It is 14\u202f916.", "一共14,916元"],
    "3.14": ["Ответ: 3,14", "La réponse est 3,14.", "It is 3.14"],
    "50000": ["共有5万人", "一共5万元。", "Всего 50 тысяч."],
    "-5": ["答案是负5。", "Ответ: минус 5.", "The answer is -5."],
    "1, 2": [
        r"\boxed{1} and \boxed{2}", r"$\boxed{1}$, $\boxed{2}$", r"\boxed{1}和\boxed{2}", r"\boxed{2} или \boxed{1}",
        r"$x=\boxed{1}$ or $x=\boxed{2}$", r"\boxed{x=1} and \boxed{x=2}", r"\boxed{1}\n\boxed{2}", r"\boxed{1}、\boxed{2}",
        r"First \boxed{1}. The second is \boxed{2}.", "The solutions are $x=1$ or $x=2$.", "答案是$1$和$2$。",
        r"\boxed{1}\text{ and }\boxed{2}", r"\boxed{1} et \boxed{2}", r"$$\boxed{1} \quad \boxed{2}$$",
    ],
    "x^2": ["答案是$x^2$。", "Ответ: $x^2$.", "最终答案为 $x^2$", "所以 $f(x)=x^2$。", "La réponse est $x^2$."],
    r"\sqrt{2}": ["答案是$\\sqrt{2}$。", "Ответ: $\\sqrt2$ см."],
}  # fmt: skip

WRONG_TEXTS = {
    "5": [
        "The answer is not 5", "The answer is not 5.", "The answer is 3 or 5.", "The answer is either 3 or 5.", "It isn't 5",
        "The answer cannot be 5.", "The answer is 3, or 5.", "The answer is 3 or maybe 5", "It could be 5", "maybe 5",
        "The answer is 5 or 6", "5, 6 or 7", "6 or 5 apples", "The answers are 3 and 5.", "The answers are 3, 5", "3/5",
        "between 3 and 5", "from 3 to 5", "The answer is at least 5", "x > 5", "so x is less than 5", "5 or more",
        "the square root of 5", "it is half of 5", "It is 5 halves.", "it is 5 squared", "The answer is 5, no, that is wrong.",
        "The answer is 5. Wait, that is incorrect.", "The answer is 6, not 5", "It is never 5", "anything but 5", "3 & 5", "3~5",
        "答案不是5", "答案不是5。", "答案是3或5", "答案是3或者5。", "答案是3、5", "答案是3和5。", "不等于5", "3到5", "可能是5", "大于5", "至少5个",
        "也许是5", "答案是5或6。", "答案是5万。", "共有5万人", "是5的一半", "答案是5，错了", "x≠5", "答案是负5", "5以上", "答案非5",
        "Ответ не 5", "Ответ: 3 или 5", "не 5", "Ответ: 3 и 5", "возможно 5", "больше 5", "Ответ: 5 тысяч", "от 3 до 5", "не менее 5",
        "La réponse n'est pas 5.", "La réponse est 3 ou 5.", "pas 5", "au moins 5", "peut-être 5", "5 mille", "3 et 5", "moins 5",
        "Die Antwort ist nicht 5.", "3 oder 5", "La respuesta no es 5.", "entre 3 y 5", "vielleicht 5",
        "答えは5ではない。", "答えは3または5", "5ではありません", "답은 5가 아니다", "3 또는 5",
        r"The answer is not \boxed{5}", r"答案不是\boxed{5}", r"Ответ не $\boxed{5}$", r"La réponse n'est pas \boxed{5}",
        r"\boxed{3} or \boxed{5}", r"\boxed{3} and \boxed{5}", r"\boxed{3}或\boxed{5}", r"\boxed{3}, \boxed{5}", r"\boxed{5} is wrong",
        r"$\boxed{3}$ or perhaps $\boxed{5}$", r"\boxed{3}, or it may be \boxed{5}", r"\boxed{3} \boxed{5}", r"\boxed{5}是错的",
        r"\boxed{3} или \boxed{5}", r"x \neq \boxed{5}", r"x is not equal to \boxed{5}", r"答案不等于$\boxed{5}$", r"\boxed{5} is not the answer",
        r"\boxed{3}\n\boxed{5}".replace(r"\n", "\n"), r"\boxed{5}不是答案", r"\boxed{6}<|im_end|>\boxed{5}", "6<|im_end|>\n5",
        "#### not 5", "#### 3 or 5", "#### 不是5", "<answer>not 5</answer>", "<answer>3或5</answer>", "<answer>5万</answer>",
        r"either \boxed{3} or \boxed{5}", r"\boxed{3} ou \boxed{5}", r"\boxed{3} oder \boxed{5}", r"It is not $5$.",
        "The answer is $3$ or $5$.", "答案不是$5$。", "答案是$3$或$5$。", "x=3或x=5", "x = 3 or x = 5",
    ],
    "916": ["The final answer is $14{,}916$. I hope it is correct.", "It is 14\u2009916", "It is $14\\,916$", "It is 14,916"],
    "14": ["Ответ: 3,14", "It is 3{,}14", "a list: 3,14"],
    "x^2": [
        "The answer is not $x^2$.", "The answer is $x$ or $x^2$.", "答案不是$x^2$。", "答案是$x$或$x^2$。", "Ответ не $x^2$.",
        "<answer>not $x^2$</answer>", "<answer>$x$ or $x^2$</answer>", "La réponse n'est pas $x^2$.", r"not \boxed{x^2}",
        "maybe $x^2$", "The answer is either $x$ or $x^2$",
    ],
    "1, 2": [r"\boxed{1} and \boxed{3}", r"\boxed{1} and \boxed{2} and \boxed{3}", r"\boxed{2}", r"not \boxed{1} and \boxed{2}", r"\boxed{(1,2)}"],
    "2": ["The solutions are $x=1$ or $x=2$.", r"$x=\boxed{1}$ or $x=\boxed{2}$"],
}  # fmt: skip


@each(cases(RIGHT_TEXTS))
def test_right_texts(expected, text):
    assert accuracy(Problem("?", {"answer": expected}), text) == 1


@each(cases(WRONG_TEXTS))
def test_wrong_texts(expected, text):
    assert accuracy(Problem("?", {"answer": expected}), text) == 0


# ---- choices and words --------------------------------------------------------------------------


@each([
    ("答案是B", True), ("答案：B。", True), ("故选B", True), ("选B。", True), ("选项B", True), ("正确答案为 B", True), ("B。", True),
    ("Ответ: B", True), ("Вариант B", True), ("La réponse est B.", True), ("Antwort: B", True), ("应选（B）", True), ("Ｂ", True),
    ("不选B", False), ("答案不是B", False), ("答案是A或B", False), ("答案是B或A", False), ("选A", False), ("Ответ: A или B", False),
    ("Ответ не B", False), ("The answer is not B", False), ("La réponse n'est pas B", False), ("答案是A", False), ("not option B", False),
    ("答案是B、C", False), ("B或C", False),
])  # fmt: skip
def test_choices_in_any_language(given, same):
    assert same_choice("B", given) is same


@each([("北京", "北京。", True), ("北京", "北京！", False), ("Москва", "МОСКВА.", True), ("北京", "上海", False)])
def test_words_in_any_language(expected, given, same):
    assert same_text(expected, given) is same
