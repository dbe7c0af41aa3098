"""The fixed texts a built engine is compared on. Changing one changes what a perplexity means.

Written for this purpose: prose, numbers, a dialogue, code, JSON and other languages, so that an
error which shows only in one kind of token is still seen.
"""

from collections.abc import Sequence

TEXTS_VERSION = 1

TEXTS: Sequence[str] = (
    "The mill stood where the valley narrowed. In spring the stream rose to the second"
    " stone and the wheel turned all night; in August it hung still, and the miller mended"
    " sacks and waited for rain. His daughter kept a book in which she wrote, every"
    " evening, how high the water was and how many bags of flour they had ground. After"
    " nine years she could tell from the first warm week of March whether the harvest"
    " would be milled before the snow. People came to ask her, and she answered with a"
    " number, never with a promise.",
    "Water boils at 100 degrees Celsius at sea level, but on a mountain of 3,000 metres it"
    " boils at about 90. The pressure of the air is lower there, so fewer molecules push"
    " back on the surface of the liquid. This is why rice takes longer to cook in high"
    " villages, and why a lid helps: it keeps the steam in, the pressure rises a little,"
    " and the temperature rises with it. A pressure cooker does the same thing on purpose"
    " and reaches 120 degrees.",
    "def moving_average(values, width):\n"
    '    """Return the mean of each window of `width` neighbours."""\n'
    "    if width < 1:\n"
    '        raise ValueError("width must be at least 1")\n'
    "    total = sum(values[:width])\n"
    "    means = [total / width]\n"
    "    for old, new in zip(values, values[width:]):\n"
    "        total += new - old\n"
    "        means.append(total / width)\n"
    "    return means\n",
    "User: I have 3 boxes with 12 apples each and give away 7. How many are left?\n"
    "Assistant: You start with 3 times 12, which is 36 apples. After giving away 7 there"
    " are 29 left.\n"
    "User: And if I share them between four friends?\n"
    "Assistant: 29 divided by 4 is 7 with 1 left over, so each friend gets 7 apples and"
    " one apple remains.\n",
    '{"station": "Harbour North", "measured_at": "2026-03-14T06:30:00Z", "readings":'
    ' [{"name": "wind_speed", "unit": "m/s", "value": 7.4}, {"name": "wave_height",'
    ' "unit": "m", "value": 1.2}, {"name": "visibility", "unit": "km", "value": 18}],'
    ' "operator": null, "valid": true}',
    "Le train de huit heures part du quai numéro deux. Il s'arrête dans chaque village, et"
    " le contrôleur connaît tout le monde. Der Zug fährt langsam, weil die Strecke alt"
    " ist, aber er kommt fast immer pünktlich an. El viaje dura una hora y media, y al"
    " final se ve el mar. 明日は雨が降るでしょう。",
    "Dear Ms Okafor, thank you for your letter of the 2nd of May. We have checked the"
    " invoice you mention and you are right: the delivery was charged twice. The amount of"
    " 48.60 euros will be returned to your account within five working days. We are sorry"
    " for the trouble. If you have any further questions, please write to us or call the"
    " number below between nine and five. Yours sincerely, the accounts department.",
    "A compiler reads a program and writes another one that does the same. First it splits"
    " the text into words, then it finds how the words belong together, then it decides"
    " where each value will live while the program runs. Most of its work is to notice"
    " what need not be done: a sum that is always the same, a loop that never runs, a copy"
    " that nobody reads. The best compilers are slow and patient, because their work is"
    " done once and the program runs a million times.",
)
