package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

const (
	// accessLife is how long after the agent's end the plugin can ask the API server itself. An API server may give less.
	accessLife = 24 * time.Hour
	// accessTurns is how often an access is renewed in its life, so that little of it is gone when the agent ends.
	accessTurns = 12
	// accessRetry is the time between attempts that fail; the access before is in force meanwhile.
	accessRetry = 15 * time.Second
)

// keepAccess keeps the plugin's access to the API server on the node's disk until ctx ends, and leaves it there: it is for when
// there is no agent. It is timed by what has passed here and not by the token's dates, since the node's clock may be set.
func (a *agent) keepAccess(ctx context.Context, c cluster) error {
	if a.cfg.PluginAccount == "" {
		return nil
	}
	failed := false
	for {
		wait, err := a.renewAccess(ctx, c)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failed:
			a.log.Error("the CNI plugin gets no new access to the API server: when there is no agent, it will decide by the record alone once the access it has is too old", zap.Error(err))
		case err == nil && failed:
			a.log.Info("the CNI plugin has access to the API server again")
		}
		failed = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// renewAccess writes a new access and tells in which time the next is due.
func (a *agent) renewAccess(ctx context.Context, c cluster) (wait time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, accessRetry)
	defer cancel()
	access, life, err := c.access(ctx, a.cfg.PluginAccount)
	if err != nil {
		return accessRetry, err
	}
	text, err := json.Marshal(access)
	if err != nil {
		return accessRetry, err
	}
	if err := writeDurably(a.cfg.PluginAccess, text); err != nil {
		return accessRetry, fmt.Errorf("write the plugin's access to the API server: %w", err)
	}
	return max(life/accessTurns, accessRetry), nil
}

// access asks for a token of the account, NAMESPACE/NAME, that is bound to no pod, so that it outlives the agent's, and tells how
// long it is good.
func (a *api) access(ctx context.Context, account string) (plugin.Access, time.Duration, error) {
	access, err := accessTo(a.config)
	if err != nil {
		return plugin.Access{}, 0, err
	}
	namespace, name, ok := strings.Cut(account, "/")
	if !ok {
		return plugin.Access{}, 0, fmt.Errorf("the plugin's service account %q: want NAMESPACE/NAME", account)
	}
	seconds := int64(accessLife / time.Second)
	body, err := json.Marshal(&authenticationv1.TokenRequest{
		TypeMeta: metav1.TypeMeta{APIVersion: authenticationv1.SchemeGroupVersion.String(), Kind: "TokenRequest"},
		Spec:     authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds},
	})
	if err != nil {
		return plugin.Access{}, 0, err
	}
	answer, err := a.core.Post().Namespace(namespace).Resource("serviceaccounts").Name(name).SubResource("token").
		SetHeader("Content-Type", runtime.ContentTypeJSON).SetHeader("Accept", runtime.ContentTypeJSON).Body(body).Do(ctx).Raw()
	if err != nil {
		return plugin.Access{}, 0, fmt.Errorf("ask for a token of service account %s: %w", account, err)
	}
	var got authenticationv1.TokenRequest
	if err := json.Unmarshal(answer, &got); err != nil || got.Status.Token == "" {
		return plugin.Access{}, 0, errors.Join(fmt.Errorf("ask for a token of service account %s: no token in the answer", account), err)
	}
	if given := got.Spec.ExpirationSeconds; given != nil { // the server's word, which may be another
		seconds = *given
	}
	access.Token = got.Status.Token
	return access, time.Duration(seconds) * time.Second, nil
}

// accessTo is how the agent itself reaches the API server, which a process of the host does in the same way: the agent has the
// host's network. The certificates are read anew each time, because they are replaced.
func accessTo(config *rest.Config) (plugin.Access, error) {
	server, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return plugin.Access{}, fmt.Errorf("the API server's address: %w", err)
	}
	if server.Scheme != "https" || config.Insecure {
		return plugin.Access{}, fmt.Errorf("the API server %s cannot be verified: the plugin would believe anybody", server.Host)
	}
	ca := config.CAData
	if len(ca) == 0 && config.CAFile != "" {
		if ca, err = os.ReadFile(config.CAFile); err != nil {
			return plugin.Access{}, fmt.Errorf("read the API server's certificates: %w", err)
		}
	}
	return plugin.Access{Server: "https://" + server.Host + strings.TrimSuffix(server.Path, "/"), ServerName: config.ServerName, CA: string(ca)}, nil
}

// access has nothing to give: there is no API server.
func (d *directory) access(context.Context, string) (plugin.Access, time.Duration, error) {
	return plugin.Access{}, 0, errors.New("objects come from a directory, which the plugin cannot ask")
}
