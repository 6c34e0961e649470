package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
)

// agentError is the agent's own word that it could not do what was asked.
type agentError struct {
	status int
	text   string
}

func (e *agentError) Error() string { return e.text }

// ask sends an event to the agent and waits for its answer.
func ask(conf Conf, path string, event Event) (Answer, error) {
	body, err := json.Marshal(event)
	if err != nil {
		return Answer{}, fmt.Errorf("encode event: %w", err)
	}
	var answer Answer
	return answer, call(conf, http.MethodPost, path, body, &answer)
}

// reachable tells whether the agent answers and is ready.
func reachable(conf Conf) error { return call(conf, http.MethodGet, StatusPath, nil, nil) }

// call does one request over the agent's socket and decodes a good answer into answer, unless that is nil.
func call(conf Conf, method, path string, body []byte, answer any) error {
	ctx, cancel := context.WithTimeout(context.Background(), conf.timeout())
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", conf.EventSocket)
		},
	}}
	request, err := http.NewRequestWithContext(ctx, method, "http://cni-agent"+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, MaxEvent))
	if err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return &agentError{response.StatusCode, strings.TrimSpace(string(text))}
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("decode the agent's answer: %w", err)
	}
	return nil
}
