//! A device's memory and its queue: kernels run in order, and nothing spins while it waits.

use super::device::{Division, Limits, WORK_GROUP_SIZE};
use super::fault::fault;
use super::listing::Found;
use super::pace::Pace;
use super::programs::{KernelSet, Programs};
use crate::error::EngineError;
use opencl3::command_queue::{CommandQueue, enqueue_copy_buffer};
use opencl3::context::Context;
use opencl3::error_codes::ClError;
use opencl3::event::{CL_COMPLETE, Event};
use opencl3::kernel::Kernel;
use opencl3::memory::{Buffer, CL_MEM_READ_WRITE, ClMem};
use opencl3::types::{CL_NON_BLOCKING, cl_mem};
use std::cell::Cell;
use std::ffi::c_void;
use std::time::{Duration, Instant};

/// The most work of one launch, in multiplications: a GPU that does ten billion a second takes less than half a second.
/// Drivers reset a device whose kernels take many seconds.
const LAUNCH_WORK_MAX: u64 = 1 << 32;

/// The shortest and the longest sleep between two looks whether work is done: a short step costs little more, and a
/// long one keeps no core busy.
const SLEEPS: (Duration, Duration) = (Duration::from_micros(20), Duration::from_micros(500));

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Memory(cl_mem),
    Int(i32),
    Unsigned(u32),
    Long(u64),
    Float(f32),
    /// Local memory of so many bytes.
    Local(usize),
}

/// The queue of one device, with its compiled kernels.
#[derive(Debug)]
pub(super) struct Queue {
    device: String,
    context: Context,
    queue: CommandQueue,
    programs: Programs,
    limits: Limits,
    pace: Pace,
    /// The most work of one launch: [`LAUNCH_WORK_MAX`], less in tests.
    pub(super) launch_work_max: u64,
    /// When the queue began to work on what is queued.
    busy_since: Instant,
    /// Queued kernels and copies: the failure of one may show in its own event alone.
    queued: Vec<Event>,
    /// The bytes of all buffers that were allocated so far. Those of the self-test are few.
    allocated_bytes: Cell<u64>,
    /// Whether a call on the device has failed. After that any call may hang, so the end of the step is not waited for.
    has_failed: Cell<bool>,
}

impl Queue {
    pub(super) fn new(found: &Found) -> Result<Self, EngineError> {
        let id = found.report.id.0.clone();
        let (division, limits) = (Division::of(&found.device, &id)?, Limits::of(&found.device, &id)?);
        let context = Context::from_device(&found.device).map_err(|error| fault(&id, "creating a context", error))?;
        // SAFETY: the queue has no properties, so it runs in order.
        let queue = unsafe { CommandQueue::create(&context, found.device.id(), 0) };
        let queue = queue.map_err(|error| fault(&id, "creating a queue", error))?;
        Ok(Self {
            programs: Programs::new(id.clone(), division),
            device: id,
            context,
            queue,
            limits,
            pace: Pace::default(),
            launch_work_max: LAUNCH_WORK_MAX,
            busy_since: Instant::now(),
            queued: Vec::new(),
            allocated_bytes: Cell::new(0),
            has_failed: Cell::new(false),
        })
    }

    /// The id of the device.
    pub(super) fn device(&self) -> &str {
        &self.device
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    fn fault(&self, what: &str, error: ClError) -> EngineError {
        self.has_failed.set(true);
        match fault(&self.device, what, error) {
            // OpenCL does not tell what was free. What the engine has got so far is what the device had for it.
            EngineError::OutOfMemory { what, .. } => {
                let free_bytes = self.allocated_bytes.get();
                EngineError::OutOfMemory { what, needed_bytes: free_bytes.saturating_add(1), free_bytes }
            }
            error => error,
        }
    }

    /// Allocates device memory, at least a byte.
    pub(super) fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer<u8>, EngineError> {
        if bytes as u64 > self.limits.buffer_max_bytes {
            let what = format!("{what} in one buffer, whose limit is {} bytes,", self.limits.buffer_max_bytes);
            let free_bytes = self.allocated_bytes.get();
            return Err(EngineError::OutOfMemory { what, needed_bytes: bytes as u64, free_bytes });
        }
        // SAFETY: no host memory is given.
        let buffer = unsafe { Buffer::create(&self.context, CL_MEM_READ_WRITE, bytes.max(1), std::ptr::null_mut()) };
        let buffer = buffer.map_err(|error| match self.fault(what, error) {
            EngineError::OutOfMemory { what, free_bytes, .. } => {
                EngineError::OutOfMemory { what, needed_bytes: bytes as u64, free_bytes }
            }
            error => error,
        })?;
        self.allocated_bytes.set(self.allocated_bytes.get() + bytes as u64);
        Ok(buffer)
    }

    /// Copies `values` into `buffer` from byte `offset` on, and waits until that is done.
    pub(super) fn write<T: bytemuck::NoUninit>(
        &self,
        buffer: &mut Buffer<u8>,
        offset: usize,
        values: &[T],
    ) -> Result<(), EngineError> {
        if values.is_empty() {
            return Ok(());
        }
        let staged = bytemuck::cast_slice(values).to_vec();
        // SAFETY: `staged` lives until the event is complete, or for ever.
        let event = unsafe { self.queue.enqueue_write_buffer(buffer, CL_NON_BLOCKING, offset, &staged, &[]) };
        let done =
            event.map_err(|error| self.fault("writing to the device", error)).and_then(|event| self.wait(&event));
        if done.is_err() {
            // The driver may still read it.
            std::mem::forget(staged);
        }
        done
    }

    /// Reads floats from `buffer` from byte `offset` on.
    pub(super) fn read(&self, buffer: &Buffer<u8>, offset: usize, values: &mut [f32]) -> Result<(), EngineError> {
        if values.is_empty() {
            return Ok(());
        }
        let mut staged = vec![0_u8; size_of_val(values)];
        // SAFETY: `staged` lives until the event is complete, or for ever.
        let event = unsafe { self.queue.enqueue_read_buffer(buffer, CL_NON_BLOCKING, offset, &mut staged, &[]) };
        let done =
            event.map_err(|error| self.fault("reading from the device", error)).and_then(|event| self.wait(&event));
        match done {
            Ok(()) => bytemuck::cast_slice_mut(values).copy_from_slice(&staged),
            // The driver may still write to it.
            Err(_) => std::mem::forget(staged),
        }
        done
    }

    /// Copies `bytes` within a buffer; the ranges do not overlap.
    pub(super) fn copy(
        &mut self,
        buffer: &Buffer<u8>,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), EngineError> {
        // SAFETY: both ranges are of the buffer, which the caller keeps, and they do not overlap.
        let copied = unsafe {
            let (queue, memory) = (self.queue.get(), buffer.get());
            enqueue_copy_buffer(queue, memory, memory, from, to, bytes, 0, std::ptr::null())
        };
        let event = copied.map_err(|code| self.fault("copying on the device", ClError(code)))?;
        self.queued.push(Event::new(event));
        Ok(())
    }

    /// Compiles a set of kernels, if that is not done.
    pub(super) fn prepare(&mut self, set: KernelSet) -> Result<(), EngineError> {
        self.programs.prepare(&self.context, set)
    }

    /// Queues a kernel with `arguments`. `groups` is the number of work-groups in both dimensions, each of
    /// [`WORK_GROUP_SIZE`] work-items.
    pub(super) fn run(
        &mut self,
        set: KernelSet,
        name: &'static str,
        arguments: &[Arg],
        groups: (usize, usize),
    ) -> Result<(), EngineError> {
        self.run_sized(set, name, arguments, groups, WORK_GROUP_SIZE)
    }

    /// As [`Queue::run`], with work-groups of `size` work-items.
    fn run_sized(
        &mut self,
        set: KernelSet,
        name: &'static str,
        arguments: &[Arg],
        groups: (usize, usize),
        size: usize,
    ) -> Result<(), EngineError> {
        if groups.0 == 0 || groups.1 == 0 {
            return Ok(());
        }
        let kernel = self.programs.kernel(&self.context, set, name)?;
        let set = arguments.iter().enumerate().try_for_each(|(index, argument)| set_argument(kernel, index, argument));
        let (global, local) = ([groups.0 * size, groups.1], [size, 1]);
        // SAFETY: the arrays have two dimensions each and live during the call.
        let queued = set.and_then(|()| unsafe {
            let (global, local) = (global.as_ptr(), local.as_ptr());
            self.queue.enqueue_nd_range_kernel(kernel.get(), 2, std::ptr::null(), global, local, &[])
        });
        let event = queued.map_err(|error| self.fault(name, error))?;
        self.queued.push(event);
        Ok(())
    }

    /// As [`Queue::run`], in parts of the second dimension, so that no launch takes long, with work-groups of `size`
    /// work-items. The kernel's last argument is the first group of a part; `work` is the number of multiplications for
    /// each group of the second dimension.
    pub(super) fn run_in_parts(
        &mut self,
        set: KernelSet,
        name: &'static str,
        arguments: &[Arg],
        (groups, size): ((usize, usize), usize),
        work: u64,
    ) -> Result<(), EngineError> {
        let at_once = usize::try_from(self.launch_work_max / work.max(1)).unwrap_or(usize::MAX).max(1);
        for first in (0..groups.1).step_by(at_once) {
            let count = at_once.min(groups.1 - first);
            self.make_room(work.saturating_mul(count as u64))?;
            let arguments: Vec<Arg> = arguments.iter().copied().chain([Arg::int(first)]).collect();
            self.run_sized(set, name, &arguments, (groups.0, count), size)?;
        }
        Ok(())
    }

    /// Begins a step: only copies of pages are queued.
    pub(super) fn begin(&mut self) {
        self.busy_since = Instant::now();
    }

    /// Waits if the queue holds as much work as it may.
    fn make_room(&mut self, work: u64) -> Result<(), EngineError> {
        if self.pace.queue(work) {
            self.finish()?;
            self.pace.queue(work);
        }
        Ok(())
    }

    /// Waits until all queued work is done, unless a call has failed already.
    pub(super) fn finish(&mut self) -> Result<(), EngineError> {
        if self.has_failed.get() {
            return Ok(());
        }
        // SAFETY: no events are waited for.
        let marker = unsafe { self.queue.enqueue_marker_with_wait_list(&[]) };
        self.wait(&marker.map_err(|error| self.fault("ending a step", error))?)?;
        self.pace.done(self.busy_since.elapsed());
        self.busy_since = Instant::now();
        for event in std::mem::take(&mut self.queued) {
            let status = event.command_execution_status().map_err(|error| self.fault("ending a step", error))?;
            if status.0 < 0 {
                return Err(self.fault("queued work", ClError(status.0)));
            }
        }
        Ok(())
    }

    fn wait(&self, event: &Event) -> Result<(), EngineError> {
        self.queue.flush().map_err(|error| self.fault("starting queued work", error))?;
        let (mut sleep, longest) = SLEEPS;
        loop {
            let status = event.command_execution_status().map_err(|error| self.fault("waiting", error))?;
            match status.0 {
                CL_COMPLETE => return Ok(()),
                code if code < 0 => return Err(self.fault("queued work", ClError(code))),
                _ => std::thread::sleep(sleep),
            }
            sleep = (sleep * 2).min(longest);
        }
    }
}

fn set_argument(kernel: &Kernel, index: usize, argument: &Arg) -> Result<(), ClError> {
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    // SAFETY: OpenCL checks the size of each argument; the callers pass the types that the kernel declares.
    unsafe {
        match argument {
            Arg::Memory(memory) => kernel.set_arg(index, memory),
            Arg::Int(value) => kernel.set_arg(index, value),
            Arg::Unsigned(value) => kernel.set_arg(index, value),
            Arg::Long(value) => kernel.set_arg(index, value),
            Arg::Float(value) => kernel.set_arg(index, value),
            Arg::Local(bytes) => kernel.set_arg_local_buffer(index, *bytes),
        }
    }
}

/// A dimension, a position, a page, a slot or a row. The limits on caches and rows keep these below 2³¹.
pub(super) fn integer(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

impl Arg {
    /// The argument of a buffer.
    pub(super) fn of(buffer: &Buffer<u8>) -> Self {
        Self::Memory(buffer.get())
    }

    /// The argument of memory that the kernel does not read.
    pub(super) fn unused() -> Self {
        Self::Memory(std::ptr::null_mut::<c_void>())
    }

    /// The argument of a dimension or an index. [`Rows`](super::rows::Rows) of 2³¹ values or more are refused.
    pub(super) fn int(value: usize) -> Self {
        Self::Int(integer(value))
    }

    pub(super) fn flag(value: bool) -> Self {
        Self::Int(i32::from(value))
    }
}
