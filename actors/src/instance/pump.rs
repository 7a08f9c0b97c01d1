//! What a head sends to its pipeline, and tells its clients.

use super::InstanceState;
use crate::core::schedule::Event;
use crate::core::state::Load;
use crate::core::view::Fact;
use crate::host::Frame;
use crate::links::Sink;
use crate::protocol::{End, HeadEvent};
use crate::request::RequestError;
use exo_engines::engine::{Incarnation, Input, Step, StepId};

impl InstanceState {
    /// Sends what may be sent, and tells clients what happened: in this order, as the pipeline waits for the next step.
    pub(super) fn pump(&mut self) {
        self.send_steps();
        self.tell_clients();
        // Clients that have gone leave pages to be given back.
        self.send_steps();
        self.report();
    }

    fn send_steps(&mut self) {
        while self.line.is_running() {
            let was_idle = self.schedule.steps_in_flight() == 0;
            let Some(plan) = self.schedule.poll_step() else { break };
            if was_idle {
                self.signs += 1;
            }
            self.next_step += 1;
            let incarnation = self.line.incarnation();
            let step = Step { incarnation, id: StepId(self.next_step), operations: plan.operations, rows: plan.rows };
            let frame = Frame { step, input: Input::Tokens(plan.tokens), samplers: plan.samplers };
            if !self.send(incarnation, frame) {
                break;
            }
        }
    }

    fn send(&self, incarnation: Incarnation, frame: Frame) -> bool {
        let first = self.args.board.find(self.args.id, End::Stage(0), incarnation);
        match first.map(|first| first.sink) {
            Some(Sink::Shard { port, .. }) => match port.send(frame) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(instance = %self.args.id, %error, "a step could not be sent");
                    false
                }
            },
            // A first shard that is gone: the news of that is on its way.
            _ => false,
        }
    }

    fn tell_clients(&mut self) {
        while let Some(event) = self.schedule.poll_event() {
            let seq = event.seq();
            let Some((events, _)) = self.requests.get(&seq) else { continue };
            let (event, is_last) = match event {
                Event::TakenUp { reused_tokens, .. } => {
                    self.totals.reused_tokens += reused_tokens as u64;
                    (HeadEvent::TakenUp { reused_tokens }, false)
                }
                Event::Token { sampled, .. } => {
                    self.totals.generated_tokens += 1;
                    (HeadEvent::Token(sampled), false)
                }
                Event::Finished { reason, .. } => (HeadEvent::Finished(reason), true),
                Event::Failed { error, .. } => {
                    let remedy = "the model's weights may be damaged: download it again".into();
                    (HeadEvent::Failed(RequestError::Engine { what: error.to_string(), remedy }), true)
                }
            };
            // The channel has room for all that a request can give; it is closed where the client has gone.
            if events.try_send(event).is_err() || is_last {
                self.cancel(seq);
            }
        }
    }

    fn report(&mut self) {
        let load = Load {
            running: self.schedule.running(),
            waiting: self.schedule.waiting(),
            pages_used: self.schedule.pages_used(),
            pages_total: self.args.wanted.demand.kv_pages,
        };
        if self.reported != Some(load) {
            self.reported = Some(load);
            self.args.facts.tell(Fact::RequestsChanged { instance: self.args.id, load, totals: self.totals });
        }
    }
}
