//! Draws the mesh: DOT as Kilo's, SVG, and text for a terminal.
