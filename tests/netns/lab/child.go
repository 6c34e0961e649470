package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"sync"
	"syscall"
	"time"
)

// This file runs in the pods: it is what a workload of the mesh does, a client and a server without any knowledge of it.

// maxAttempts bounds what one answer remembers.
const maxAttempts = 20000

// runProgram takes calls from descriptor 3 until it is closed, and with serve answers other programs' calls.
func runProgram(serve bool) {
	name := os.Getenv("POD_NAME")
	var said map[string]chan string
	if serve {
		var err error
		if said, err = listenConversations(); err != nil {
			fmt.Fprintln(os.Stderr, "listen:", err)
			os.Exit(1)
		}
		for port, f := range map[int]func(net.Listener, string) error{PortHTTP: serveHTTP, PortTCP: serveTCP} {
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				fmt.Fprintln(os.Stderr, "listen:", err)
				os.Exit(1)
			}
			go func() { fmt.Fprintln(os.Stderr, "serve:", f(l, name)); os.Exit(1) }()
		}
	}
	conn := os.NewFile(3, "lab")
	if err := json.NewEncoder(conn).Encode(response{Number: readyNumber}); err != nil {
		return
	}
	var mu sync.Mutex
	cancels := map[int]context.CancelFunc{}
	for d := json.NewDecoder(conn); ; {
		var r request
		if err := d.Decode(&r); err != nil {
			return
		}
		mu.Lock()
		if r.Call == nil {
			if cancel := cancels[r.Number]; cancel != nil {
				cancel()
			}
			mu.Unlock()
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancels[r.Number] = cancel
		mu.Unlock()
		go func() {
			var a Answer
			if r.Call.Conversation != "" {
				a.Words = converse(ctx, *r.Call, said)
			} else {
				a = try(ctx, *r.Call)
			}
			cancel()
			mu.Lock()
			defer mu.Unlock()
			delete(cancels, r.Number)
			if err := json.NewEncoder(conn).Encode(response{Number: r.Number, Answer: a}); err != nil {
				fmt.Fprintln(os.Stderr, "answer:", err)
			}
		}()
	}
}

// try makes a call's exchanges one after the other.
func try(ctx context.Context, c Call) Answer {
	if c.Size == 0 {
		c.Size = 2048
	}
	if c.Timeout == 0 {
		c.Timeout = 3 * time.Second
	}
	if c.Count == 0 && c.Duration == 0 {
		c.Count = 1
	}
	exchange, end := tcpExchange(c)
	if c.HTTP {
		exchange, end = httpExchange(c)
	}
	defer end()
	var a Answer
	began := time.Now()
	for ctx.Err() == nil && len(a.Attempts) < maxAttempts {
		if c.Count > 0 && len(a.Attempts) == c.Count || c.Duration > 0 && time.Since(began) >= c.Duration {
			break
		}
		if len(a.Attempts) > 0 {
			time.Sleep(c.Interval)
		}
		t := Attempt{Start: time.Now()}
		once, cancel := context.WithTimeout(ctx, c.Timeout)
		if err := exchange(once, &t); err != nil {
			t.Error, t.Refused = err.Error(), errors.Is(err, syscall.ECONNREFUSED)
		}
		cancel()
		t.Took = time.Since(t.Start)
		a.Attempts = append(a.Attempts, t)
		if c.SameConnection && t.failed() {
			break
		}
	}
	return a
}

// greeting opens each message of the TCP conversation, in both directions, as a line of JSON.
type greeting struct {
	Size int    `json:"size"`
	Pod  string `json:"pod,omitempty"`
	Seen string `json:"seen,omitempty"`
}

// exchanger makes one exchange and writes down what it saw.
type exchanger func(context.Context, *Attempt) error

// tcpExchange sends a message and wants it back unchanged. end closes what is still open.
func tcpExchange(c Call) (exchange exchanger, end func()) {
	var conn net.Conn
	var in *bufio.Reader
	end = func() {
		if conn != nil {
			conn.Close()
		}
	}
	want := payload(c.Size)
	exchange = func(ctx context.Context, t *Attempt) error {
		if conn == nil {
			var err error
			if conn, err = dial(ctx, c.To); err != nil {
				conn = nil
				return err
			}
			in = bufio.NewReader(conn)
		}
		t.Local = conn.LocalAddr().String()
		mine, mineIn := conn, in
		if !c.SameConnection {
			conn = nil
			defer mine.Close()
		}
		deadline, _ := ctx.Deadline()
		mine.SetDeadline(deadline)
		sent := make(chan error, 1)
		go func() { sent <- send(mine, greeting{Size: c.Size}, want) }()
		line, err := mineIn.ReadBytes('\n')
		if err != nil {
			mine.Close()
			return errors.Join(<-sent, err)
		}
		var g greeting
		if err := json.Unmarshal(line, &g); err != nil {
			return fmt.Errorf("answer %q: %w", line, err)
		}
		got := make([]byte, g.Size)
		if _, err := io.ReadFull(mineIn, got); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return errors.New("the answer differs from what was sent")
		}
		t.Server, t.Seen = g.Pod, g.Seen
		return <-sent
	}
	return exchange, end
}

func send(w io.Writer, g greeting, body []byte) error {
	line, err := json.Marshal(g)
	if err != nil {
		return err
	}
	_, err = w.Write(append(append(line, '\n'), body...))
	return err
}

func dial(ctx context.Context, to string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", to)
}

func serveTCP(l net.Listener, name string) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			for in := bufio.NewReader(conn); ; {
				line, err := in.ReadBytes('\n')
				var g greeting
				if err != nil || json.Unmarshal(line, &g) != nil {
					return
				}
				body := make([]byte, g.Size)
				if _, err := io.ReadFull(in, body); err != nil {
					return
				}
				if send(conn, greeting{Size: g.Size, Pod: name, Seen: conn.RemoteAddr().String()}, body) != nil {
					return
				}
			}
		}()
	}
}

// httpExchange makes a request; everything but the payload is answered in headers. end closes what is still open.
func httpExchange(c Call) (exchange exchanger, end func()) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: !c.SameConnection,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, c.To) },
	}}
	method, path := c.Method, c.Path
	if method == "" {
		method = http.MethodGet
	}
	if path == "" {
		path = "/"
	}
	want := payload(c.Size)
	exchange = func(ctx context.Context, t *Attempt) error {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
			GotConn: func(got httptrace.GotConnInfo) { t.Local = got.Conn.LocalAddr().String() },
		})
		var body io.Reader
		if method != http.MethodGet && method != http.MethodHead {
			body = bytes.NewReader(want)
		}
		req, err := http.NewRequestWithContext(ctx, method, "http://"+c.To+path, body)
		if err != nil {
			return err
		}
		req.Header.Set("X-Size", fmt.Sprint(c.Size))
		req.Header.Set("X-Payload", Marker)
		for k, v := range c.Header {
			req.Header.Set(k, v)
		}
		if c.Host != "" {
			req.Host = c.Host
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		t.Status, t.Server, t.Seen = resp.StatusCode, resp.Header.Get("X-Pod"), resp.Header.Get("X-Seen")
		if t.Server == "" {
			t.Body = string(got[:min(len(got), 200)])
		} else if t.Status == http.StatusOK && method != http.MethodHead && !bytes.Equal(got, want) {
			return errors.New("the body is not the payload")
		}
		return nil
	}
	return exchange, client.CloseIdleConnections
}

func serveHTTP(l net.Listener, name string) error {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Protocols: &protocols, ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			size := 0
			fmt.Sscan(r.Header.Get("X-Size"), &size)
			w.Header().Set("X-Pod", name)
			w.Header().Set("X-Seen", r.RemoteAddr)
			w.Write(payload(min(max(size, 0), 1<<24)))
		}),
	}
	return server.Serve(l)
}
