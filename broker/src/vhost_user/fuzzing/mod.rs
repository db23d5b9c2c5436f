//! Arbitrary messages, for fuzzers and property tests.
//!
//! Each public function takes arbitrary bytes. A panic is a finding.

mod script;
#[cfg(test)]
mod tests;

use super::connection::Message;
use super::fake::{Call, FakeDevice};
use super::message::{HEADER_BYTES, Header, Request};
use super::session::Session;

use self::script::{Script, Sent};

/// Parses a header and a body that came with some file descriptors.
pub fn parse_message(bytes: &[u8]) {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::parse(*header) else { return };
    let Some((fds, body)) = rest.split_first() else { return };
    let body = &body[..body.len().min(header.body_bytes)];
    // Also formats the result: formatting must work for every refused message.
    match Request::parse(header.request, body, usize::from(*fds)) {
        Ok(request) => drop(format!("{request:?}")),
        Err(error) => drop(error.to_string()),
    }
}

/// Runs a session with a front-end that sends what the bytes describe: mostly well-formed requests, in any order, with
/// values that are right, nearly right and wrong.
///
/// # Panics
///
/// If the session asks the device for something that the device's contract excludes.
pub fn run_session(bytes: &[u8]) {
    calls_of(bytes);
}

/// The calls that such a session makes to its device before it ends.
fn calls_of(bytes: &[u8]) -> Vec<Call> {
    let mut device = FakeDevice::default();
    let calls = device.calls.clone();
    let mut session = Session::new(&mut device);
    for Sent { bytes, fds } in Script::new(bytes) {
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else { break };
        let Ok(header) = Header::parse(*header) else { break };
        if header.body_bytes != body.len() {
            break;
        }
        match session.handle(Message { header, body: body.to_vec(), fds }) {
            Ok(Some(reply)) => assert_eq!(reply.request, header.request, "a reply to another request"),
            Ok(None) => {}
            Err(error) => {
                drop(error.to_string());
                break;
            }
        }
    }
    drop(session);
    calls.take()
}
