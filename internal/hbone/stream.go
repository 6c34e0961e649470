package hbone

import (
	"crypto/tls"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// sendBuffer is how much Write keeps ahead of the tunnel, in bytes.
const sendBuffer = 64 << 10

// creditRest is how many bytes that were read the driver need not be told of, until the next poke or until the peer may
// send little more on the connection (connInfo.low).
const creditRest = 4 << 10

// Stream is one CONNECT stream, on either side: a net.Conn with half close and reset. It is used in one of two ways:
// Read and Write (any goroutine), or one call of Relay, after which Read and Write must not be called. Close, Abort,
// Reset and Counters may be called at any time from any goroutine.
type Stream struct {
	t    carrier
	conn *connInfo

	sent, received atomic.Int64 // application bytes taken from Write or the relayed socket; given to Read or it
	halfClosed     atomic.Bool

	mu       sync.Mutex
	sleepers *sleepers // of Read and Write; nil until there are any, as a relay has none
	rq       [][]byte
	rerr     error // what Read returns when rq is empty
	wq       []byte
	wlim     int   // Write waits while wq is this long
	werr     error // what Write returns
	wfin     bool  // CloseWrite was called
	credit   int   // bytes Read has taken and the driver has not yet told the machine
	cut      bool  // a reset is wanted
	cutCode  uint32
	status   int // answer to the CONNECT (client), 0 = none yet
	header   []hpack.HeaderField
	cause    error // of Abort
	over     bool
	onEnd    func()
	onAnswer func(status int, err error) // instead of awaitAnswer

	ms      *machine.Stream // owned by the driver
	queued  bool            // owned by the driver: on its list of streams to pump
	blocked bool            // owned by the driver: has output that the windows do not let out
	app     *loopApp        // owned by the loop driver: the relayed application socket
	early   *earlyApp       // owned by the loop driver: that socket before the answer; set before the CONNECT
	cancel  func()          // ends Incoming.Context
}

// carrier is what a stream asks of its driver.
type carrier interface {
	poke(s *Stream) // s has output, credit to give back or a wish (half close, reset)
	relay(s *Stream, app *net.TCPConn, done func(relay.Result))
	relayFD(s *Stream, app int, done func(relay.Result))
}

// connInfo is what the streams of one tunnel have in common.
type connInfo struct {
	local, remote net.Addr
	tls           *tls.ConnectionState
	low           atomic.Bool // the peer may send little more on the connection: what is read is told at once
}

func newStream(t carrier, info *connInfo) *Stream {
	return &Stream{t: t, conn: info, wlim: sendBuffer}
}

// sleepers are those who wait in Read and Write, and until when they do.
type sleepers struct {
	readable sync.Cond // rq, rerr, read
	writable sync.Cond // wq, werr, write, answer
	read     deadline
	write    deadline
}

// waiters is s.sleepers, made if need be. s.mu is held, as for all that follow.
func (s *Stream) waiters() *sleepers {
	if s.sleepers == nil {
		s.sleepers = &sleepers{}
		s.sleepers.readable.L, s.sleepers.writable.L = &s.mu, &s.mu
	}
	return s.sleepers
}

func (s *Stream) wakeReaders() {
	if s.sleepers != nil {
		s.sleepers.readable.Broadcast()
	}
}

func (s *Stream) wakeWriters() {
	if s.sleepers != nil {
		s.sleepers.writable.Broadcast()
	}
}

func (s *Stream) readLate() bool  { return s.sleepers != nil && s.sleepers.read.passed() }
func (s *Stream) writeLate() bool { return s.sleepers != nil && s.sleepers.write.passed() }

var _ net.Conn = (*Stream)(nil)

// Read fills p with bytes that the peer sent. After the peer's half close it returns io.EOF, after a reset a *ResetError.
func (s *Stream) Read(p []byte) (int, error) {
	s.mu.Lock()
	for len(s.rq) == 0 && s.rerr == nil && !s.readLate() && len(p) > 0 {
		s.waiters().readable.Wait()
	}
	n := 0
	for n < len(p) && len(s.rq) > 0 {
		k := copy(p[n:], s.rq[0])
		n += k
		if s.rq[0] = s.rq[0][k:]; len(s.rq[0]) == 0 {
			s.rq[0] = nil
			s.rq = s.rq[1:]
		}
	}
	if n > 0 || len(p) == 0 {
		s.credit += n
		tell := s.credit >= creditRest || s.conn.low.Load()
		s.mu.Unlock()
		s.received.Add(int64(n))
		if tell {
			s.t.poke(s)
		}
		return n, nil
	}
	err := s.rerr
	if err == nil {
		err = os.ErrDeadlineExceeded
	}
	s.mu.Unlock()
	return 0, err
}

// Write queues p for the peer; it waits while the peer's windows are closed and the stream's own buffer is full.
func (s *Stream) Write(p []byte) (int, error) {
	total := 0
	for {
		s.mu.Lock()
		for len(s.wq) >= s.wlim && s.werr == nil && !s.wfin && !s.writeLate() {
			s.waiters().writable.Wait()
		}
		if err := s.writeError(); err != nil {
			s.mu.Unlock()
			return total, err
		}
		n := min(len(p), s.wlim-len(s.wq))
		s.wq = append(s.wq, p[:n]...)
		s.mu.Unlock()
		s.sent.Add(int64(n))
		total += n
		p = p[n:]
		if n > 0 {
			s.t.poke(s)
		}
		if len(p) == 0 {
			return total, nil
		}
	}
}

func (s *Stream) writeError() error {
	switch {
	case s.werr != nil:
		return s.werr
	case s.wfin:
		return ErrClosed
	case s.writeLate():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite ends this side's direction (END_STREAM) after what was written; the other direction goes on.
func (s *Stream) CloseWrite() error {
	s.mu.Lock()
	if s.werr != nil || s.wfin {
		err := s.werr
		s.mu.Unlock()
		return err
	}
	s.wfin = true
	s.halfClosed.Store(true)
	s.wakeWriters()
	s.mu.Unlock()
	s.t.poke(s)
	return nil
}

// Close gives the stream up: what was written is still sent and the direction ended; bytes of the peer that were not
// read, or come later, reset the stream, as closing a TCP socket would.
func (s *Stream) Close() error {
	s.mu.Lock()
	if len(s.rq) > 0 && !s.cut {
		s.cut, s.cutCode = true, machine.CodeCancel
	}
	if s.rerr == nil || len(s.rq) > 0 {
		s.rerr = ErrClosed
	}
	s.rq = nil
	s.wfin = true
	s.wakeReaders()
	s.wakeWriters()
	s.mu.Unlock()
	s.t.poke(s)
	return nil
}

// Reset ends both directions at once: RST_STREAM(CANCEL), which the application behind the peer sees as a TCP RST.
func (s *Stream) Reset() { s.Abort(ErrAborted) }

// Abort is Reset with a reason: Read, Write and the Result of a relay give err. A relayed application socket is reset
// too. This is how a live connection is cut when a policy change says so.
func (s *Stream) Abort(err error) {
	if err == nil {
		err = ErrAborted
	}
	s.mu.Lock()
	if s.over || s.cut {
		s.mu.Unlock()
		return
	}
	s.cut, s.cutCode, s.cause = true, machine.CodeCancel, err
	s.rq, s.wq = nil, nil
	s.rerr, s.werr = err, err
	s.wakeReaders()
	s.wakeWriters()
	s.mu.Unlock()
	s.t.poke(s)
}

// resetQuietly is Reset without a cause, so that the error of the socket is what a relay reports.
func (s *Stream) resetQuietly() {
	s.mu.Lock()
	if !s.over && !s.cut {
		s.cut, s.cutCode = true, machine.CodeCancel
	}
	s.mu.Unlock()
	s.t.poke(s)
}

// Relay gives the stream and app to each other and returns at once; both are owned by the relay from now on. Half close
// and RST are passed on in both directions. With the loop driver no goroutine is kept per connection. done is called
// once, when both directions have ended, and must not block for long: it runs on the event loop.
func (s *Stream) Relay(app *net.TCPConn, done func(relay.Result)) { s.t.relay(s, app, done) }

// RelayFD is Relay for a bare descriptor of a connected TCP socket, non-blocking and close-on-exec.
func (s *Stream) RelayFD(app int, done func(relay.Result)) { s.t.relayFD(s, app, done) }

// Counters reads the application bytes so far: sent into the stream and received from it. It may be called at any time.
func (s *Stream) Counters() (sent, received int64) { return s.sent.Load(), s.received.Load() }

// HalfClosed says that one side or both have ended their direction. It may be called at any time.
func (s *Stream) HalfClosed() bool { return s.halfClosed.Load() }

// ConnectionState is the tunnel's TLS state: the peer's certificates, suite and curve. It must not be changed.
func (s *Stream) ConnectionState() *tls.ConnectionState { return s.conn.tls }

// ResponseHeader is the header of the peer's 2xx answer (client side), without :status; nil while it has not come.
func (s *Stream) ResponseHeader() []hpack.HeaderField {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.header
}

// LocalAddr is this side's address of the tunnel's TCP connection.
func (s *Stream) LocalAddr() net.Addr { return s.conn.local }

// RemoteAddr is the peer proxy's address of the tunnel's TCP connection.
func (s *Stream) RemoteAddr() net.Addr { return s.conn.remote }

// SetDeadline sets both deadlines; the zero time means none.
func (s *Stream) SetDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiters().read.set(t, &s.waiters().readable)
	s.waiters().write.set(t, &s.waiters().writable)
	return nil
}

// SetReadDeadline sets when a waiting Read gives up with os.ErrDeadlineExceeded.
func (s *Stream) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiters().read.set(t, &s.waiters().readable)
	return nil
}

// SetWriteDeadline sets when a waiting Write gives up with os.ErrDeadlineExceeded.
func (s *Stream) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiters().write.set(t, &s.waiters().writable)
	return nil
}

// deadline is one direction's; the stream's lock guards it.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (d *deadline) set(t time.Time, c *sync.Cond) {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.at = t
	if !t.IsZero() {
		// Taking the lock keeps the wake-up from falling between a waiter's check and its Wait.
		d.timer = time.AfterFunc(time.Until(t), func() {
			c.L.Lock()
			defer c.L.Unlock()
			c.Broadcast()
		})
	}
	c.Broadcast()
}
