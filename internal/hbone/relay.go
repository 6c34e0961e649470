package hbone

import (
	"errors"
	"io"
	"net"
	"sync"

	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// relayStream is Relay with two goroutines, for tunnels without an event loop.
func relayStream(s *Stream, app *net.TCPConn, done func(relay.Result)) {
	var wg sync.WaitGroup
	var up, down error
	wg.Go(func() { up = copyUp(s, app) })
	wg.Go(func() { down = copyDown(s, app) })
	go func() {
		wg.Wait()
		app.Close()
		s.Close()
		err := errors.Join(up, down)
		if err != nil && s.abortCause() != nil {
			err = s.abortCause()
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
func copyUp(s *Stream, app *net.TCPConn) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := app.Read(buf)
		if n > 0 {
			if _, werr := s.Write(buf[:n]); werr != nil {
				resetApp(app)
				return werr
			}
		}
		if err == io.EOF {
			return s.CloseWrite()
		}
		if err != nil {
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
}

// copyDown carries the stream's bytes to the application.
func copyDown(s *Stream, app *net.TCPConn) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := s.Read(buf)
		if n > 0 {
			if _, werr := app.Write(buf[:n]); werr != nil {
				s.resetQuietly()
				resetApp(app)
				return werr
			}
		}
		if err == io.EOF {
			return app.CloseWrite()
		}
		if err != nil {
			resetApp(app)
			return err
		}
	}
}

// resetApp closes app so that its other end sees a RST.
func resetApp(app *net.TCPConn) {
	_ = app.SetLinger(0) // fails only on a socket that is closed already
	app.Close()
}
