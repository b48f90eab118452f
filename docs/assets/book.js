// Formulas: arithmatex wraps each in \( \) or \[ \]; KaTeX sets them.
document.querySelectorAll(".arithmatex").forEach((element) => {
  const tex = element.textContent.trim();
  try {
    katex.render(tex.slice(2, -2), element, { displayMode: tex.startsWith("\\[") });
  } catch (error) {
    console.error(`formula: ${error.message}`);
  }
});
