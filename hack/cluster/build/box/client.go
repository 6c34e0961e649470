package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Result is one line of box client or box tcp.
type Result struct {
	N      int               `json:"n"`
	Time   time.Time         `json:"time"`
	MS     float64           `json:"ms"`
	Status int               `json:"status,omitempty"`
	Error  string            `json:"error,omitempty"`
	Local  string            `json:"local,omitempty"`
	Header map[string]string `json:"header,omitempty"`
	Reply  json.RawMessage   `json:"reply,omitempty"` // the body, when it is JSON
	Body   string            `json:"body,omitempty"`  // else its first KiB
}

// summary counts the results of one run.
type summary struct {
	Summary  bool           `json:"summary"`
	Requests int            `json:"requests"`
	Errors   int            `json:"errors"`
	Error    string         `json:"error,omitempty"` // the first of them
	Status   map[int]int    `json:"status"`
	Pods     map[string]int `json:"pods"`
	Versions map[string]int `json:"versions"`
}

type headers http.Header

func (h headers) String() string { return "" }
func (h headers) Set(s string) error {
	k, v, ok := strings.Cut(s, ":")
	if !ok {
		return fmt.Errorf("header %q: want 'Key: value'", s)
	}
	http.Header(h).Add(strings.TrimSpace(k), strings.TrimSpace(v))
	return nil
}

type clientOptions struct {
	url, method, body, ca string
	n, concurrency        int
	interval, timeout     time.Duration
	keepalive, h2c        bool
	summary               bool
	header                headers
}

// target takes the first argument off: it may stand before or after the flags.
func target(fs *flag.FlagSet, args []string) (string, error) {
	first := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		first, args = args[0], args[1:]
	}
	if err := fs.Parse(args); err != nil {
		return "", err
	}
	if first == "" {
		first = fs.Arg(0)
	}
	if first == "" {
		return "", errors.New("say where to")
	}
	return first, nil
}

func client(ctx context.Context, args []string) error {
	o := clientOptions{header: headers{}}
	fs := flag.NewFlagSet("client", flag.ExitOnError)
	fs.IntVar(&o.n, "n", 1, "requests; 0: until stopped")
	fs.IntVar(&o.concurrency, "concurrency", 1, "requests at once")
	fs.DurationVar(&o.interval, "interval", 0, "between two requests of one worker")
	fs.DurationVar(&o.timeout, "timeout", 5*time.Second, "for a whole request")
	fs.StringVar(&o.method, "method", "GET", "")
	fs.StringVar(&o.body, "d", "", "body")
	fs.StringVar(&o.ca, "ca", "", "PEM file to trust for https")
	fs.BoolVar(&o.keepalive, "keepalive", false, "reuse connections")
	fs.BoolVar(&o.h2c, "h2c", false, "HTTP/2 without TLS")
	fs.BoolVar(&o.summary, "summary", false, "one line of counts at the end instead of a line a request")
	fs.Var(o.header, "H", "'Key: value', repeatable")
	var err error
	if o.url, err = target(fs, args); err != nil {
		return err
	}
	if !strings.Contains(o.url, "://") {
		o.url = "http://" + o.url
	}
	hc, err := httpClient(o)
	if err != nil {
		return err
	}
	return o.run(ctx, hc)
}

func httpClient(o clientOptions) (*http.Client, error) {
	tr := &http.Transport{DisableKeepAlives: !o.keepalive, MaxIdleConnsPerHost: o.concurrency}
	if o.h2c {
		tr.Protocols = new(http.Protocols)
		tr.Protocols.SetUnencryptedHTTP2(true)
	}
	if o.ca != "" {
		b, err := os.ReadFile(o.ca)
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("%s holds no certificate", o.ca)
		}
		tr.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return &http.Client{Transport: tr, Timeout: o.timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, nil
}

func (o clientOptions) run(ctx context.Context, hc *http.Client) error {
	out := &printer{}
	sum := summary{Summary: true, Status: map[int]int{}, Pods: map[string]int{}, Versions: map[string]int{}}
	var mu sync.Mutex
	var next atomic.Int64
	var wg sync.WaitGroup
	for range o.concurrency {
		wg.Go(func() {
			for ctx.Err() == nil {
				n := int(next.Add(1))
				if o.n > 0 && n > o.n {
					return
				}
				r := o.request(ctx, hc, n)
				mu.Lock()
				sum.add(r)
				mu.Unlock()
				if !o.summary {
					out.print(r)
				}
				wait(ctx, o.interval)
			}
		})
	}
	wg.Wait()
	if o.summary {
		out.print(sum)
	}
	if sum.Errors > 0 {
		return fmt.Errorf("%d of %d requests got no answer", sum.Errors, sum.Requests)
	}
	return nil
}

func (s *summary) add(r Result) {
	s.Requests++
	if r.Error != "" {
		if s.Errors++; s.Errors == 1 {
			s.Error = fmt.Sprintf("request %d after %v ms: %s", r.N, r.MS, r.Error)
		}
		return
	}
	s.Status[r.Status]++
	var who Reply
	if json.Unmarshal(r.Reply, &who) == nil && who.Pod != "" {
		s.Pods[who.Pod]++
		s.Versions[who.Version]++
	}
}

func (o clientOptions) request(ctx context.Context, hc *http.Client, n int) (res Result) {
	res = Result{N: n, Time: time.Now()}
	defer func() { res.MS = milliseconds(time.Since(res.Time)) }()
	var body io.Reader
	if o.body != "" {
		body = strings.NewReader(o.body)
	}
	req, err := http.NewRequestWithContext(ctx, o.method, o.url, body)
	if err != nil {
		res.Error = err.Error()
		return res
	}
	req.Header = http.Header(o.header).Clone()
	if h := req.Header.Get("Host"); h != "" {
		req.Host = h
	}
	resp, err := hc.Do(req)
	if err != nil {
		res.Error = err.Error()
		return res
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	res.Status, res.Error = resp.StatusCode, text(err)
	res.Header = map[string]string{}
	for k, v := range resp.Header {
		res.Header[k] = strings.Join(v, ", ")
	}
	if json.Valid(b) {
		res.Reply = b
	} else {
		res.Body = string(b[:min(len(b), 1024)])
	}
	return res
}

func tcp(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("tcp", flag.ExitOnError)
	n, size := fs.Int("n", 1, "round trips; 0: until stopped"), fs.Int("size", 64, "bytes of each")
	interval, timeout := fs.Duration("interval", 0, "between two"), fs.Duration("timeout", 5*time.Second, "for connecting and for each")
	data := fs.String("d", "", "what to send, in place of -size letters")
	addr, err := target(fs, args)
	if err != nil {
		return err
	}
	msg := []byte(*data)
	if *data == "" {
		msg = bytes.Repeat([]byte("m"), max(*size, 1))
	}
	out := &printer{}
	start := time.Now()
	c, err := net.DialTimeout("tcp", addr, *timeout)
	if err != nil {
		out.print(Result{Time: start, MS: milliseconds(time.Since(start)), Error: err.Error()})
		return err
	}
	defer c.Close()
	for i := 1; (*n == 0 || i <= *n) && ctx.Err() == nil; i++ {
		r := Result{N: i, Time: time.Now(), Local: c.LocalAddr().String()}
		err := roundTrip(c, msg, *timeout)
		r.MS, r.Error = milliseconds(time.Since(r.Time)), text(err)
		out.print(r)
		if err != nil {
			return err
		}
		wait(ctx, *interval)
	}
	return nil
}

func roundTrip(c net.Conn, msg []byte, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(msg)
		wrote <- err
	}()
	back := make([]byte, len(msg))
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if !bytes.Equal(back, msg) {
		return errors.New("the echo differs")
	}
	return <-wrote
}

func whoami(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("whoami", flag.ExitOnError)
	timeout := fs.Duration("timeout", 5*time.Second, "for all of it")
	addr, err := target(fs, args)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("tcp", addr, *timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(*timeout)); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print(line)
	return err
}

func udp(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("udp", flag.ExitOnError)
	data, timeout := fs.String("d", "hello", ""), fs.Duration("timeout", 5*time.Second, "")
	addr, err := target(fs, args)
	if err != nil {
		return err
	}
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(*timeout)); err != nil {
		return err
	}
	if _, err := c.Write([]byte(*data)); err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	n, err := c.Read(b)
	(&printer{}).print(map[string]string{"local": c.LocalAddr().String(), "answer": string(b[:n]), "error": text(err)})
	return err
}

func lookup(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("lookup", flag.ExitOnError)
	server := fs.String("server", "", "resolver to ask, IP:PORT; empty: those of resolv.conf")
	network := fs.String("network", "", "udp or tcp; empty: udp, and tcp for long answers")
	timeout := fs.Duration("timeout", 20*time.Second, "for each name")
	if err := fs.Parse(args); err != nil {
		return err
	}
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, way, address string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, cmp.Or(*network, way), cmp.Or(*server, address))
	}}
	var failed error
	for _, name := range fs.Args() {
		ctx, cancel := context.WithTimeout(ctx, *timeout)
		start := time.Now()
		found, err := resolver.LookupHost(ctx, name)
		cancel()
		(&printer{}).print(map[string]any{"name": name, "addresses": found, "error": text(err), "ms": milliseconds(time.Since(start))})
		failed = errors.Join(failed, err)
	}
	return failed
}

func addrs(context.Context, []string) error {
	links, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, l := range links {
		var list []string
		as, err := l.Addrs()
		if err != nil {
			return err
		}
		for _, a := range as {
			list = append(list, a.String())
		}
		(&printer{}).print(map[string]any{"link": l.Name, "addresses": list})
	}
	return nil
}

// lineWriter prints JSON lines to a peer; what fails to arrive, the peer misses.
type lineWriter struct{ w io.Writer }

func (l *lineWriter) print(v any) { _ = json.NewEncoder(l.w).Encode(v) }

func wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
