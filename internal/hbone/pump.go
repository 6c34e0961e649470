package hbone

import (
	"io"

	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
)

// The driver's side of a Stream. Drivers call these with their own lock held or from their own goroutine; the stream's
// lock is always the inner one.

// deliver queues bytes of the peer for Read. It says false when nobody will read them.
func (s *Stream) deliver(p []byte, end bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rerr != nil {
		return len(p) == 0
	}
	if len(p) > 0 {
		// Small pieces share a chunk, so that a peer that sends byte by byte does not cost a slice for each.
		if n := len(s.rq); n > 0 && cap(s.rq[n-1])-len(s.rq[n-1]) >= len(p) {
			s.rq[n-1] = append(s.rq[n-1], p...)
		} else {
			s.rq = append(s.rq, append(make([]byte, 0, max(512, len(p))), p...))
		}
	}
	if end {
		s.rerr = io.EOF
		s.halfClosed.Store(true)
	}
	s.wakeReaders()
	return true
}

// answered is the peer's answer to the CONNECT.
func (s *Stream) answered(status int, header []hpack.HeaderField) {
	s.mu.Lock()
	s.status, s.header = status, header
	s.wakeWriters()
	tell := s.onAnswer
	s.onAnswer = nil
	s.mu.Unlock()
	if tell != nil {
		tell(status, nil)
	}
}

// awaitAnswer waits for answered or the stream's end.
func (s *Stream) awaitAnswer() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.status == 0 && s.werr == nil {
		s.waiters().writable.Wait()
	}
	if s.status == 0 {
		return 0, s.werr
	}
	return s.status, nil
}

// givenUp says that the stream was given up before its CONNECT was sent, and ends it then.
func (s *Stream) givenUp() bool {
	s.mu.Lock()
	up := s.cut || s.over
	s.mu.Unlock()
	if up {
		s.end(&ResetError{Code: machine.CodeCancel})
	}
	return up
}

// end is called when the machine is done with the stream; err nil means that both directions ended in order. Bytes that
// came before stay readable unless the stream was reset.
func (s *Stream) end(err error) {
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return
	}
	s.over = true
	if err != nil {
		if s.cause != nil {
			err = s.cause
		}
		s.rq, s.wq = nil, nil
		if s.rerr != ErrClosed {
			s.rerr = err
		}
		s.werr = err
	} else if s.werr == nil {
		s.werr = ErrClosed
	}
	s.wakeReaders()
	s.wakeWriters()
	onEnd, cancel, tell := s.onEnd, s.cancel, s.onAnswer
	s.onAnswer = nil
	err = s.werr
	s.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	if onEnd != nil {
		onEnd()
	}
	if tell != nil {
		tell(0, err)
	}
}

// complete tells whether the peer's reset says only that it wants no more of this side's bytes: it has sent all of its own
// (RFC 9113 §8.1).
func (s *Stream) complete(code uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return code == machine.CodeNo && s.rerr == io.EOF
}

// takeCut says that a reset is wanted, once, and with which code.
func (s *Stream) takeCut() (code uint32, cut bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	code, cut = s.cutCode, s.cut
	s.cut = false
	return code, cut
}

// pump moves what the stream wants into the machine and appends its frames to out, at most room bytes of them. more says that the stream has output left although its window is open.
func (s *Stream) pump(out []byte, room int) (_ []byte, more bool) {
	s.mu.Lock()
	ms := s.ms
	s.consumed()
	s.blocked = false
	if ms.Gone() || !s.mayWrite() {
		s.mu.Unlock()
		return out, false
	}
	for len(s.wq) > 0 {
		n := min(len(s.wq), ms.Budget())
		if n == 0 {
			s.blocked = true
			break
		}
		if n = min(n, room-machine.HeaderLen); n <= 0 {
			more = true
			break
		}
		at := len(out)
		out = append(out, make([]byte, machine.HeaderLen)...)
		ms.DataHeader(out[at:], n, false)
		out = append(out, s.wq[:n]...)
		if s.wq = s.wq[n:]; len(s.wq) == 0 {
			s.wq = nil
		}
		room -= machine.HeaderLen + n
	}
	if len(s.wq) == 0 && s.wfin && !ms.SentEnd() && room < machine.HeaderLen {
		more = true
	} else if len(s.wq) == 0 && s.wfin && !ms.SentEnd() {
		at := len(out)
		out = append(out, make([]byte, machine.HeaderLen)...)
		ms.DataHeader(out[at:], 0, true)
	}
	s.wakeWriters()
	s.mu.Unlock()
	if ms.Gone() {
		s.end(nil)
	}
	return out, more
}

// consumed tells the machine what Read has taken. s.mu is held.
func (s *Stream) consumed() {
	if s.credit > 0 {
		s.ms.Consumed(s.credit)
		s.credit = 0
	}
}

// collect takes what was read of all streams of m, little of each, when the peer may send little more; from then on each
// Read tells of it, since the peer may have nothing left to send that would bring collect here again.
func (i *connInfo) collect(m *machine.Conn) {
	low := m.Low()
	if low == i.low.Load() {
		return
	}
	i.low.Store(low) // first: a Read that takes its stream's lock after what follows sees it
	if !low {
		return
	}
	m.Each(func(ms *machine.Stream) {
		s := ms.User.(*Stream)
		s.mu.Lock()
		s.consumed()
		s.mu.Unlock()
	})
}

// mayWrite says that DATA may be sent: the CONNECT was answered.
func (s *Stream) mayWrite() bool { return s.status/100 == 2 }
