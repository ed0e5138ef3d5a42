//! The source of a running agent's report, which is computed on request only.

use tokio::sync::{mpsc, oneshot};

use super::Report;

/// Most requests that may wait for the agent.
const QUEUE: usize = 8;

/// A question for a report. The agent answers by sending it.
pub type Question = oneshot::Sender<Report>;

/// Asks the agent of this process.
#[derive(Clone, Debug)]
pub struct ReportSource(mpsc::Sender<Question>);

impl ReportSource {
    /// A source, and the questions that the agent answers.
    pub fn channel() -> (Self, mpsc::Receiver<Question>) {
        let (questions, asked) = mpsc::channel(QUEUE);
        (Self(questions), asked)
    }

    /// The report as of now; `None` while the agent is ending.
    pub async fn report(&self) -> Option<Report> {
        let (question, answer) = oneshot::channel();
        self.0.send(question).await.ok()?;
        answer.await.ok()
    }

    /// A source that always gives this report, for tests. Needs a tokio runtime.
    #[cfg(test)]
    pub(crate) fn fixed(report: Report) -> Self {
        let (source, mut questions) = Self::channel();
        tokio::spawn(async move {
            while let Some(question) = questions.recv().await {
                let _ = question.send(report.clone());
            }
        });
        source
    }
}
