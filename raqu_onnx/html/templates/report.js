"use strict";
(async () => {
  const items = JSON.parse(document.getElementById("plots").textContent);
  const views = {};
  const draw = (name) => (views[name] ??= Bokeh.embed.embed_item(items[name], `plot-${name}`));
  const model = (name) => Bokeh.documents.map((doc) => doc.get_model_by_name(name)).find((found) => found != null);
  // One after the other from the top, so that the page can be read and scrolled meanwhile.
  const drawAll = async () => {
    for (const name of Object.keys(items)) {
      await draw(name);
      document.body.dataset.drawn = name;
      await new Promise((resume) => setTimeout(resume));
    }
  };
  const buttons = document.querySelectorAll("[data-show]");
  for (const button of buttons) {
    button.addEventListener("click", async () => {
      await draw("floor");
      for (const other of buttons) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      for (const legend of document.querySelectorAll("[data-for]")) {
        legend.hidden = legend.dataset.for !== button.dataset.show;
      }
      for (const name of ["by-layer", "by-bits"]) {
        model(name).visible = name === button.dataset.show;
      }
    });
  }
  // Colours of axes come from the page's style, which plots read when they are drawn.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", async () => {
    for (const view of await Promise.all(Object.values(views))) {
      for (const root of view.roots ?? []) {
        root.invalidate_render?.();
      }
    }
  });
  await drawAll();
  if (matchMedia("(pointer: fine)").matches && "floor" in items) {
    model("enlarge").active = true;
  }
})();
