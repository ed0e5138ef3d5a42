//! Which place reaches which: every ordered pair of places, asked at once.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::traffic::{Place, source_seen};

/// The answers of all pairs. A pair is ordered: from, to.
#[derive(Clone, Debug, Default)]
pub struct Matrix {
    places: Vec<String>,
    cells: BTreeMap<(String, String), Result<IpAddr, String>>,
}

impl Matrix {
    /// Asks from every place, for every other place, at the address and port that `target` names.
    ///
    /// A target of `None` is not asked.
    pub fn ask(places: &[Place], target: impl Fn(&Place) -> Option<(IpAddr, u16)>) -> Self {
        let pairs = places.iter().flat_map(|from| {
            let others = places.iter().filter(|to| to.name != from.name);
            others.map(move |to| (from, to))
        });
        // All at once: a pair that fails takes seconds, and there may be many of them.
        let cells = std::thread::scope(|scope| {
            let threads: Vec<_> = pairs
                .filter_map(|(from, to)| Some((from, to, target(to)?)))
                .map(|(from, to, server)| {
                    let ask = move || source_seen(&from.namespace, SocketAddr::from(server));
                    ((from.name.clone(), to.name.clone()), scope.spawn(ask))
                })
                .collect();
            let answers = threads.into_iter().map(|(pair, thread)| {
                let answer = thread.join().expect("asking does not panic");
                (pair, answer.map_err(|error| format!("{error:#}")))
            });
            answers.collect()
        });
        Self {
            places: places.iter().map(|place| place.name.clone()).collect(),
            cells,
        }
    }

    /// How many pairs were asked.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.cells.len()
    }

    /// The pairs that got no answer, with the reason, one line each.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        self.cells
            .iter()
            .filter_map(|((from, to), answer)| {
                let reason = answer.as_ref().err()?;
                Some(format!("{from} -> {to}: {reason}"))
            })
            .collect()
    }

    /// The answered pairs: from, to, and the address the server saw.
    pub fn seen(&self) -> impl Iterator<Item = (&str, &str, IpAddr)> {
        self.cells.iter().filter_map(|((from, to), answer)| {
            let address = answer.as_ref().ok()?;
            Some((from.as_str(), to.as_str(), *address))
        })
    }

    /// Whether one pair got an answer.
    #[must_use]
    pub fn reached(&self, from: &str, to: &str) -> bool {
        matches!(
            self.cells.get(&(from.to_owned(), to.to_owned())),
            Some(Ok(_))
        )
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.places.iter().map(String::len).max().unwrap_or(0);
        write!(f, "{:width$} ", "from \\ to")?;
        // The columns have the rows' order, so their numbers are enough.
        for number in 1..=self.places.len() {
            write!(f, " {number:>4}")?;
        }
        for (number, from) in self.places.iter().enumerate() {
            write!(f, "\n{from:width$} ")?;
            for (other, to) in self.places.iter().enumerate() {
                let cell = match self.cells.get(&(from.clone(), to.clone())) {
                    _ if number == other => ".",
                    Some(Ok(_)) => "ok",
                    Some(Err(_)) => "FAIL",
                    None => "-",
                };
                write!(f, " {cell:>4}")?;
            }
            write!(f, "   = {}", number + 1)?;
        }
        Ok(())
    }
}
