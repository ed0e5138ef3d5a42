//! The one event loop: snapshot, kernel event, timer or signal → plan → apply.
