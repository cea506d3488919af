"use strict";
// Values under the pointer, beside their names in the legend.
for (const figure of document.querySelectorAll(".chart")) {
  const series = JSON.parse(figure.dataset.series);
  const values = figure.querySelectorAll(".key b");
  for (const svg of figure.querySelectorAll("svg")) watch(svg, series, values);
}

function watch(svg, series, values) {
  const [first, last, left, right, width] = JSON.parse(svg.dataset.scale);
  const line = svg.querySelector(".pointer");
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    if (at < left || at > right) return hide();
    const x = first + (at - left) / (right - left) * (last - first);
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    line.removeAttribute("hidden");
    series.forEach((one, index) => {
      if (!one.x.length) return;
      let nearest = 0;
      one.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(one.x[nearest] - x)) nearest = i; });
      values[index].textContent = Number(one.y[nearest].toPrecision(4)).toString();
    });
  };
  const hide = () => {
    line.setAttribute("hidden", "");
    values.forEach((value) => { value.textContent = ""; });
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerleave", hide);
}
