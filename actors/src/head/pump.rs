//! The head's output: steps to its pipeline, events to its clients.

use super::HeadState;
use crate::core::node_status::Fact;
use crate::core::request::RequestError;
use crate::core::scheduler::Event;
use crate::core::status::Load;
use crate::transport::protocol::{HeadEvent, LinkEnd};
use crate::worker::engine_thread::Frame;
use crate::worker::links::LinkTarget;
use exo_engines::engine::{Incarnation, Input, Step, StepId};

impl HeadState {
    /// Sends the due steps before the clients' events, because the pipeline waits for its next step.
    pub(super) fn pump(&mut self) {
        self.send_steps();
        self.send_events();
        // Sending events cancels the requests of disconnected clients. Another step releases their pages.
        self.send_steps();
        self.ask_for_drafts();
        self.report_load();
    }

    fn send_steps(&mut self) {
        while self.pipeline.is_running() {
            let was_idle = self.scheduler.steps_in_flight() == 0;
            let Some(plan) = self.scheduler.poll_step() else { break };
            if was_idle {
                self.progress += 1;
            }
            self.next_step += 1;
            let incarnation = self.pipeline.incarnation();
            let step = Step { incarnation, id: StepId(self.next_step), operations: plan.operations, rows: plan.rows };
            let frame = Frame { step, input: Input::Tokens(plan.tokens), samplers: plan.samplers };
            if !self.send(incarnation, frame) {
                break;
            }
        }
    }

    fn send(&self, incarnation: Incarnation, frame: Frame) -> bool {
        let first = self.args.link_registry.find(self.args.id, LinkEnd::Stage(0), incarnation);
        match first.map(|first| first.target) {
            Some(LinkTarget::Shard { engine, .. }) => match engine.send(frame) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(instance = %self.args.id, %error, "the first shard accepts no steps");
                    false
                }
            },
            // The first shard has stopped; an event of its stage follows.
            _ => false,
        }
    }

    fn send_events(&mut self) {
        while let Some(event) = self.scheduler.poll_event() {
            let seq = event.seq();
            let Some((events, _)) = self.requests.get(&seq) else { continue };
            let (event, is_last) = match event {
                Event::Admitted { cached_tokens, .. } => {
                    self.totals.cached_tokens += cached_tokens as u64;
                    (HeadEvent::Admitted { cached_tokens }, false)
                }
                Event::Token { sampled, .. } => {
                    self.totals.generated_tokens += 1;
                    (HeadEvent::Token(sampled), false)
                }
                Event::Finished { reason, .. } => (HeadEvent::Finished(reason), true),
                Event::Refused { error, .. } => (HeadEvent::Failed(RequestError::Admit(error)), true),
                Event::Failed { error, .. } => {
                    let remedy = "the model's weights may be damaged: download it again".into();
                    (HeadEvent::Failed(RequestError::Engine { what: error.to_string(), remedy }), true)
                }
            };
            // The channel has capacity for all events of a request, so sending fails only if the client has closed it.
            if events.try_send(event).is_err() || is_last {
                self.cancel(seq);
            }
        }
    }

    fn report_load(&mut self) {
        let load = Load {
            running: self.scheduler.running(),
            waiting: self.scheduler.waiting(),
            pages_used: self.scheduler.pages_used(),
            pages_total: self.pipeline.deployment().demand.kv_pages,
        };
        if self.reported != Some(load) {
            self.reported = Some(load);
            self.args.facts.tell(Fact::RequestsChanged { instance: self.args.id, load, totals: self.totals });
        }
    }
}
