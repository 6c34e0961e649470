package hbone

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"

	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// appRead is how much is read from an application at once, in bytes.
const appRead = 32 << 10

// relayStream is Relay with two goroutines, for tunnels without an event loop. Buffers come from a pool and are held only
// while there are bytes in them, so that an idle relay costs its two stacks.
func relayStream(s *Stream, app *net.TCPConn, buffers *sync.Pool, done func(relay.Result)) {
	var wg sync.WaitGroup
	var up, down error
	wg.Go(func() { up = copyUp(s, app, buffers) })
	wg.Go(func() { down = copyDown(s, app) })
	go func() {
		wg.Wait()
		app.Close()
		s.Close()
		err := up
		if err == nil {
			err = down
		}
		if cause := s.abortCause(); err != nil && cause != nil {
			err = cause
		}
		res := relay.Result{Err: err, Reset: err != nil}
		res.Sent, res.Received = s.Counters()
		done(res)
	}()
}

func (s *Stream) abortCause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

// copyUp carries the application's bytes into the stream. A failure resets the other direction too.
func copyUp(s *Stream, app *net.TCPConn, buffers *sync.Pool) error {
	raw, err := app.SyscallConn()
	if err != nil {
		s.resetQuietly()
		return err
	}
	for {
		buf, n, err := readReady(raw, buffers)
		if n > 0 {
			_, werr := s.Write((*buf)[:n])
			buffers.Put(buf)
			if errors.Is(werr, ErrClosed) {
				return nil // the peer wants no more; copyDown may still have bytes of it
			}
			if werr != nil {
				resetApp(app)
				return werr
			}
			continue
		}
		if err == nil {
			if err := s.CloseWrite(); !errors.Is(err, ErrClosed) {
				return err
			}
			return nil
		}
		s.mu.Lock()
		ended := s.werr
		s.mu.Unlock()
		if ended != nil && !errors.Is(ended, ErrClosed) {
			return ended // copyDown closed the socket because the stream was reset
		}
		s.resetQuietly()
		return err
	}
}

// readReady waits for bytes without a buffer, then reads them into one of the pool. Without bytes or an error, the peer
// has ended.
func readReady(raw syscall.RawConn, buffers *sync.Pool) (buf *[]byte, n int, err error) {
	waitErr := raw.Read(func(fd uintptr) bool {
		b, _ := buffers.Get().(*[]byte)
		if b == nil {
			b = new([]byte)
			*b = make([]byte, appRead)
		}
		for {
			k, errno := loop.Read(int(fd), *b)
			switch {
			case errno == syscall.EINTR:
				continue
			case errno == 0 && k > 0:
				buf, n = b, k
				return true
			case errno != 0 && errno != syscall.EAGAIN:
				err = errno
			}
			buffers.Put(b)
			return errno != syscall.EAGAIN
		}
	})
	if waitErr != nil {
		return nil, 0, waitErr
	}
	return buf, n, err
}

// copyDown carries the stream's bytes to the application.
func copyDown(s *Stream, app *net.TCPConn) error {
	for {
		bs, err := s.take()
		if len(bs) > 0 {
			n, werr := (*net.Buffers)(&bs).WriteTo(app)
			s.took(int(n))
			if werr != nil {
				s.resetQuietly()
				resetApp(app)
				return werr
			}
			continue
		}
		if err == io.EOF {
			return app.CloseWrite()
		}
		resetApp(app)
		return err
	}
}

// take waits for bytes of the peer and returns all there are; took must be called when they are used up.
func (s *Stream) take() ([][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.rq) == 0 && s.rerr == nil {
		s.waiters().readable.Wait()
	}
	if len(s.rq) == 0 {
		return nil, s.rerr
	}
	bs := s.rq
	s.rq = nil
	return bs, nil
}

// took gives the peer credit for n bytes.
func (s *Stream) took(n int) {
	s.received.Add(int64(n))
	s.mu.Lock()
	s.credit += n
	tell := s.credit >= creditRest || s.conn.low.Load()
	s.mu.Unlock()
	if tell {
		s.t.poke(s)
	}
}

// resetApp closes app so that its other end sees a RST.
func resetApp(app *net.TCPConn) {
	_ = app.SetLinger(0) // fails only on a socket that is closed already
	app.Close()
}
