package relay

import (
	"net"
	"sync"
	"sync/atomic"
)

// Handle is a live relay between two TCP connections.
type Handle struct {
	a, b           *net.TCPConn
	sent, received atomic.Int64
	cut            atomic.Bool
	once           sync.Once
	err            error
}

// Splice relays between a and b inside the kernel (splice(2)) and owns both from now on. done is called once, in a
// goroutine of the relay, when both directions have ended; it must not block for long. Sent counts a to b.
func Splice(a, b *net.TCPConn, done func(Result)) *Handle {
	h := &Handle{a: a, b: b}
	go h.run(done)
	return h
}

// Abort cuts the relay: both ends see a TCP reset and Result.Err is err. Calls after the first change nothing.
func (h *Handle) Abort(err error) {
	h.once.Do(func() {
		h.err = err
		h.cut.Store(true)
		h.reset()
	})
}

// Counters reads the bytes carried so far, a to b and b to a. It may be called at any time.
func (h *Handle) Counters() (sent, received int64) { return h.sent.Load(), h.received.Load() }
