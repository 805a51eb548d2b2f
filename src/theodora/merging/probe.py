"""The text on which forms of a model are compared when the user gives none of their own."""

# Plain sentences, figures, code, a chat turn and other scripts: an error in one token's path shows in one of them.
PROBE_TEXT = """\
The river rises in the hills to the north and reaches the sea after 214 kilometres. In a dry summer most of its \
upper course disappears under gravel, and people who have lived beside it all their lives can still tell you where \
to dig for water. In 1887 a bridge of seven arches was built at the ford; it carried carts, then lorries, and was \
closed in March 2004 after a survey found cracks wider than 3.5 mm in two of the piers.

def mean(values: list[float]) -> float:
    \"\"\"The arithmetic mean; 0.0 for an empty list.\"\"\"
    return sum(values) / len(values) if values else 0.0

Question: A 54-year-old woman has had chest pain on climbing stairs for three weeks. What should be ruled out first?
Answer: Coronary artery disease, because the pain comes with effort and goes with rest.

Der Zug nach Köln fährt um 17:42 Uhr von Gleis 9 ab. L'été dernier, nous avons traversé les Alpes à vélo. \
今日はとても良い天気ですね。 Сегодня хорошая погода. {"name": "probe", "values": [1, 2.5, -3e8], "ok": true}
"""
