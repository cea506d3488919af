// What the theme leaves out for readers without a mouse: scrolling parts take the focus, captions have a level.
document.addEventListener("DOMContentLoaded", () => {
  for (const part of document.querySelectorAll(".highlight pre, .content table.docutils, .content p:has(> img)"))
    part.tabIndex = 0;
  for (const caption of document.querySelectorAll('.caption[role="heading"]')) caption.setAttribute("aria-level", "2");
});
