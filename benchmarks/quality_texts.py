# SPDX-License-Identifier: Apache-2.0
"""Texts to compare logits on: prose, code, markup, numbers, other languages; some 130 tokens each."""
# ruff: noqa: E501, RUF001

TEXTS = {
    "story": """\
The ferry was late again, so Marta sat on the wet bench and counted the gulls. There were eleven of \
them, then nine, then a great many, because someone on the pier had opened a bag of chips. She had \
meant to practise what she would say to her brother, but each time she reached the second sentence \
the wind took it away. By the time the boat came round the point with its one yellow lamp, she had \
decided to say nothing at all and simply hand him the letter. He would know the handwriting. He \
would probably laugh, and then he would stop laughing.
""",
    "encyclopedia": """\
A tidal bore forms where a river with a shallow, narrowing mouth meets a sea with a large difference \
between high and low water. As the tide rises, water piles up faster than the channel can carry it \
upstream, and the front steepens into a wave that travels against the current. Most bores are less \
than a metre high, although a few exceed four metres at the spring tides of March and September. \
Their speed depends on the depth ahead of the front: to a first approximation it is the square root \
of the depth times the acceleration of gravity.
""",
    "python": '''\
from collections import OrderedDict


class LruCache:
    """Keeps the most recently used items, up to a capacity."""

    def __init__(self, capacity):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._items = OrderedDict()

    def get(self, key, default=None):
        if key not in self._items:
            return default
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key, value):
        self._items[key] = value
        self._items.move_to_end(key)
''',
    "cpp": """\
#include <algorithm>
#include <vector>

// Merges intervals that touch or overlap; the result is sorted by start.
std::vector<Interval> merge(std::vector<Interval> intervals) {
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.start < b.start; });
  std::vector<Interval> merged;
  for (const Interval& next : intervals) {
    if (!merged.empty() && next.start <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, next.end);
    } else {
      merged.push_back(next);
    }
  }
  return merged;
}
""",
    "typescript": """\
export async function fetchWithRetry<T>(url: string, attempts = 3, delayMs = 200): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      const response = await fetch(url, { headers: { Accept: "application/json" } });
      if (!response.ok) {
        throw new Error(`request failed with status ${response.status}`);
      }
      return (await response.json()) as T;
    } catch (error) {
      if (attempt >= attempts) {
        throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, delayMs * 2 ** attempt));
    }
  }
}
""",
    "sql": """\
CREATE TABLE readings (
    station_id  INTEGER NOT NULL REFERENCES stations (id),
    taken_at    TIMESTAMP NOT NULL,
    celsius     NUMERIC(4, 1),
    PRIMARY KEY (station_id, taken_at)
);

-- Warmest day of each station in the last year
SELECT s.name, r.taken_at::date AS day, MAX(r.celsius) AS warmest
FROM readings r
JOIN stations s ON s.id = r.station_id
WHERE r.taken_at >= now() - INTERVAL '1 year'
GROUP BY s.name, day
ORDER BY warmest DESC
LIMIT 20;
""",
    "markdown": """\
# Keeping sourdough alive

A starter wants three things: **flour**, **water** and *regular attention*.

| day | flour | water | what to expect        |
|-----|-------|-------|-----------------------|
| 1   | 50 g  | 50 g  | nothing               |
| 3   | 50 g  | 50 g  | bubbles, a sour smell |
| 7   | 30 g  | 30 g  | doubles in six hours  |

1. Throw away all but a spoonful.
2. Feed it and leave the lid *loose*.
3. If it smells of acetone, see [hungry starters](#hungry) below.
""",
    "log": """\
2031-04-02T06:14:09.881Z INFO  pump-3 pressure=4.12 bar flow=18.7 l/min temp=21.4
2031-04-02T06:14:19.884Z INFO  pump-3 pressure=4.15 bar flow=18.9 l/min temp=21.4
2031-04-02T06:14:29.879Z WARN  pump-3 pressure=5.60 bar flow=11.2 l/min temp=24.0
""",
    "german": """\
Als der Schnee endlich geschmolzen war, fanden wir im Garten alles wieder, was wir seit November \
vermisst hatten: einen roten Handschuh, zwei Wäscheklammern und den Schlüssel zum Schuppen, nach dem \
mein Großvater den ganzen Winter gesucht hatte. Er betrachtete ihn lange, rieb den Rost mit dem \
Daumen ab und sagte, jetzt brauche er ihn nicht mehr, denn das Schloss habe er ja aufgebrochen.
""",
    "spanish": """\
El mercado abre a las seis, pero los pescadores llegan mucho antes, cuando todavía no hay luz y sólo \
se oyen los motores de las barcas. Cada uno tiene su sitio junto al muro y nadie discute por él. A \
mi abuela le gustaba comprar sardinas al último de la fila, porque decía que los primeros vendían \
más caro y contaban peores chistes. Después tomábamos un café y volvíamos a casa por la playa.
""",
    "russian": """\
Поезд остановился между двумя станциями, и в вагоне стало так тихо, что было слышно, как тикают часы \
у старика напротив. Никто не знал, почему мы стоим. За окном тянулось поле, белое и совершенно пустое, \
только далеко, у самого леса, медленно двигалась чёрная точка. Сначала я подумал, что это собака, но \
потом понял: человек идёт на лыжах прямо к нам.
""",
    "chinese": """\
每年秋天，村里的人都会把晒干的玉米挂在屋檐下，远远看去像一排金色的帘子。孩子们喜欢在下面跑来跑去，\
大人则坐在门口聊天，商量什么时候去镇上卖苹果。去年雨水太多，收成不好，大家都有些担心；\
今年天气很好，连最小的那棵梨树也结了果。奶奶说，等第一场雪下来以后，她要教我做她小时候吃过的那种糖。
""",
}
