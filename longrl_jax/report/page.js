"use strict";
// Shows the values under the pointer. Texts are set as text, never as HTML.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const box = svg.closest("figure").querySelector("output");
  const [low, high, left, right] = chart.x;
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 10);
  cursor.setAttribute("y2", 176);
  const shown = (v) => (chart.percent ? `${(100 * v).toFixed(1)} %` : String(v));
  const nearest = (steps, at) => {
    let best = -1;
    steps.forEach((s, i) => { if (best < 0 || Math.abs(s - at) < Math.abs(steps[best] - at)) best = i; });
    return best;
  };
  const show = (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
    const wish = low + ((x - left) / (right - left)) * (high - low);
    const every = chart.series.flatMap((s) => s.steps.concat(s.dots.map((d) => d[0])));
    const at = every[nearest(every, wish)];
    const lines = [`step ${at}`];
    for (const s of chart.series) {
      const name = chart.series.length > 1 ? `${s.name}: ` : "";
      const i = s.steps.indexOf(at);
      if (i >= 0 && s.values[i] !== null) lines.push(name + shown(s.values[i]));
      const dot = s.dots.find((d) => d[0] === at);
      if (dot) {
        const ends = dot[2] === dot[3] ? "" : ` (${shown(dot[2])} to ${shown(dot[3])})`;
        lines.push(`${name}validation ${shown(dot[1])}${ends}`);
      }
    }
    box.textContent = lines.join("\n");
    box.style.display = "block";
    const px = left + ((at - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
    svg.append(cursor);
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { box.style.display = "none"; cursor.remove(); });
}
